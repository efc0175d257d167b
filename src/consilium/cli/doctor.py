"""``consilium doctor``: what this machine will do, whether a folder is whole, whether routers are right."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import shutil
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from consilium.cli.arguments import json_flag, path
from consilium.cli.running import Place, running_arguments, settle
from consilium.errors import ConsiliumError

if TYPE_CHECKING:
    from consilium.conformance.suite import Verdict

LOW_DISK = 2 * 2**30


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        nargs="?",
        type=path,
        metavar="FOLDER",
        help="compare each file of this run or checkpoint with its hash; default: check the machine",
    )
    parser.add_argument(
        "--routers",
        action="store_true",
        help="check every published router against its golden vectors instead",
    )
    running_arguments(parser, dtype="what train finds faster here")
    json_flag(parser)


def run(options: Namespace) -> int:
    if options.folder is not None:
        return _folder(options)
    if options.routers:
        return _routers(options)
    place = settle(options)
    ready = "ready: try consilium demo"
    return _tell(dict(_facts(place)), list(_problems()), ready, json_wanted=options.json)


def _tell(facts: Mapping[str, str], problems: list[str], well: str, *, json_wanted: bool) -> int:
    """Print facts and problems; 1 when something is wrong."""
    if json_wanted:
        print(json.dumps({"facts": facts, "problems": problems}, indent=2))
        return 1 if problems else 0
    lines = [*facts.items(), *(("problem", problem) for problem in problems)]
    lines.append(("verdict", "see the problems above" if problems else well))
    for name, text in lines:
        print(f"{name:<12} {text}")
    return 1 if problems else 0


def _folder(options: Namespace) -> int:
    """Compare a checkpoint with its manifest, or read every tensor where it has none."""
    from consilium.checkpoint.folders import checkpoint_in

    checkpoint = checkpoint_in(options.folder)
    inside = checkpoint.rglob("*") if checkpoint.is_dir() else [checkpoint]
    sizes = [item.stat().st_size for item in inside if item.is_file()]
    facts = {"folder": str(checkpoint), "files": f"{len(sizes)}, {sum(sizes) / 1e9:,.3f} GB"}
    problems: list[str] = []
    try:
        facts["checked"] = _verify(checkpoint)
    except ConsiliumError as error:
        problems.append(str(error))
    return _tell(facts, problems, "whole and unchanged", json_wanted=options.json)


def _verify(checkpoint: Path) -> str:
    from consilium.disk import manifest

    if (checkpoint / manifest.NAME).exists():
        manifest.verify(checkpoint)
        return f"sizes and SHA-256 of {len(manifest.read_manifest(checkpoint))} files"
    from consilium.checkpoint import store

    store.load(checkpoint, check_finite=True)
    return "shapes and values of every tensor; nobody stored hashes here"


def _routers(options: Namespace) -> int:
    """Run the golden vectors and print a line a system; 1 when a router decides anything else."""
    from consilium.conformance import suite
    from consilium.report.plain import columns

    verdicts = [suite.check(vectors) for vectors in suite.shipped()]
    failed = not all(verdict.passed for verdict in verdicts)
    if options.json:
        systems = [_data(verdict) for verdict in verdicts]
        print(json.dumps({"passed": not failed, "systems": systems}, indent=2))
        return int(failed)
    print(columns([_HEADINGS, *(_row(verdict) for verdict in verdicts)], right=(1, 2)))
    for verdict in verdicts:
        for difference in verdict.differences:
            print(f"differs: {difference}")
    return int(failed)


_HEADINGS = ("system", "cases", "choices", "experts", "max |dw|", "verdict")


def _row(verdict: Verdict) -> tuple[str, ...]:
    """A weight error stands for experts too: it is infinite where they differ."""
    exact = math.isfinite(verdict.weight_error)
    return (
        verdict.model,
        str(verdict.cases),
        str(verdict.choices),
        "exact" if exact else "differ",
        f"{verdict.weight_error:.0e}" if exact else "-",
        "pass" if verdict.passed else "fail",
    )


def _data(verdict: Verdict) -> dict[str, object]:
    exact = math.isfinite(verdict.weight_error)
    return {
        "system": verdict.model,
        "passed": verdict.passed,
        "cases": verdict.cases,
        "choices": verdict.choices,
        "experts_exact": exact,
        "weight_error": verdict.weight_error if exact else None,
        "differences": list(verdict.differences),
    }


def _facts(place: Place) -> Iterator[tuple[str, str]]:
    import torch

    import consilium
    from consilium.machine.device import device_text
    from consilium.machine.memory import memory_limit, physical_memory
    from consilium.machine.processors import affinity, cpu_name

    yield "consilium", consilium.__version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    yield "processor", f"{cpu_name()}, {len(affinity())} of {os.cpu_count()} for this process"
    memory = memory_limit() or physical_memory()
    yield "memory", f"{memory / 2**30:.1f} GiB for this process" if memory else "not known here"
    yield "accelerator", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    yield "disk", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here"
    yield "used", f"{device_text(place.device)}, {place.threads} threads, {_dtype(place)} in training"
    yield "extras", _extras(("transformers", "shtab"))


def _dtype(place: Place) -> str:
    from consilium.training.precision import faster_dtype

    return place.dtype or f"{faster_dtype()} (measured)"


def _extras(names: Iterable[str]) -> str:
    return ", ".join(filter(importlib.util.find_spec, names)) or "none installed, none needed"


def _problems() -> Iterator[str]:
    import torch

    from consilium.data.builtin.domains import available_domains
    from consilium.model.build import build
    from consilium.recipes import catalogue

    if shutil.disk_usage(".").free < LOW_DISK:
        yield "less than 2 GiB of disk is free; a run of the demo needs about half of that."
    try:
        available_domains()
    except ConsiliumError as error:
        yield str(error)
    with tempfile.TemporaryDirectory() as folder:
        if not os.access(Path(folder), os.W_OK):
            yield f"the temporary folder {folder} cannot be written; set TMPDIR."
    output = build(catalogue.recipe("deepseek-v3", "tiny"))(torch.zeros(1, 8, dtype=torch.long))
    if not bool(torch.isfinite(output.logits).all()):
        yield "a tiny model gives logits that are not finite: this build of torch is broken."
