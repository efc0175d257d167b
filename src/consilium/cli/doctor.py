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
from consilium.words.say import Say, plain, say

if TYPE_CHECKING:
    from consilium.conformance.suite import Verdict

LOW_DISK = 2 * 2**30


def arguments(parser: ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "folder",
        nargs="?",
        type=path,
        metavar="FOLDER",
        help="compare each file of this run or checkpoint with its hash; default: check the machine",
    )
    what.add_argument(
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
    place, voice = settle(options), plain if options.json else say
    facts, problems = dict(_facts(place, voice)), list(_problems(voice))
    return _tell(facts, problems, say("ready: try consilium demo"), json_wanted=options.json)


def _tell(facts: Mapping[str, str], problems: list[str], well: str, *, json_wanted: bool) -> int:
    """Print facts and problems; 1 when something is wrong."""
    from consilium.report.plain import columns

    if json_wanted:
        print(json.dumps({"facts": facts, "problems": problems}, indent=2))
        return 1 if problems else 0
    lines = [*facts.items(), *((say("problem"), problem) for problem in problems)]
    lines.append((say("verdict"), say("see the problems above") if problems else well))
    print(columns(lines))
    return 1 if problems else 0


def _folder(options: Namespace) -> int:
    """Compare a checkpoint with its manifest, or read every tensor where it has none."""
    from consilium.checkpoint.folders import checkpoint_in

    checkpoint = checkpoint_in(options.folder)
    inside = checkpoint.rglob("*") if checkpoint.is_dir() else [checkpoint]
    sizes = [item.stat().st_size for item in inside if item.is_file()]
    voice = plain if options.json else say
    facts = {voice("folder"): str(checkpoint), voice("files"): f"{len(sizes)}, {sum(sizes) / 1e9:,.3f} GB"}
    problems: list[str] = []
    try:
        facts[voice("checked")] = _verify(checkpoint, voice)
    except ConsiliumError as error:
        problems.append(str(error))
    return _tell(facts, problems, say("whole and unchanged"), json_wanted=options.json)


def _verify(checkpoint: Path, say: Say) -> str:
    from consilium.disk import manifest

    if (checkpoint / manifest.NAME).exists():
        manifest.verify(checkpoint)
        return say("sizes and SHA-256 of {n} files", n=len(manifest.read_manifest(checkpoint)))
    from consilium.checkpoint import store

    store.load(checkpoint, check_finite=True)
    return say("shapes and values of every tensor; nobody stored hashes here")


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
    print(columns([_headings(), *(_row(verdict) for verdict in verdicts)], right=(1, 2)))
    for verdict in verdicts:
        for difference in verdict.differences:
            print(say("differs: {what}", what=difference))
    return int(failed)


def _headings() -> tuple[str, ...]:
    return say("system"), say("cases"), say("choices"), say("experts"), "max |dw|", say("verdict")


def _row(verdict: Verdict) -> tuple[str, ...]:
    """A weight error stands for experts too: it is infinite where they differ."""
    exact = math.isfinite(verdict.weight_error)
    return (
        verdict.model,
        str(verdict.cases),
        str(verdict.choices),
        say("exact") if exact else say("differ"),
        f"{verdict.weight_error:.0e}" if exact else "-",
        say("pass") if verdict.passed else say("fail"),
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


def _facts(place: Place, say: Say) -> Iterator[tuple[str, str]]:
    import torch

    import consilium
    from consilium.machine.device import device_text
    from consilium.machine.memory import memory_limit, physical_memory
    from consilium.machine.processors import affinity, cpu_name

    system = f"{platform.system()} {platform.machine()}"
    yield "consilium", consilium.__version__
    yield "python", say("{version} on {system}", version=platform.python_version(), system=system)
    yield "torch", f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    here = {"cpu": cpu_name(), "usable": len(affinity()), "cores": os.cpu_count()}
    yield say("processor"), say("{cpu}, {usable} of {cores} for this process", **here)
    memory = (memory_limit() or physical_memory() or 0) / 2**30
    room = say("{size:.1f} GiB for this process", size=memory) if memory else say("not known here")
    yield say("memory"), room
    yield say("accelerator"), torch.cuda.get_device_name() if torch.cuda.is_available() else say("none")
    yield say("disk"), say("{size:.1f} GiB free here", size=shutil.disk_usage(".").free / 2**30)
    used = {"device": device_text(place.device), "threads": place.threads, "dtype": _dtype(place, say)}
    yield say("used"), say("{device}, {threads} threads, {dtype} in training", **used)
    yield say("kernels"), _kernels(say)
    yield say("extras"), _extras(("transformers", "shtab")) or say("none installed, none needed")


def _dtype(place: Place, say: Say) -> str:
    from consilium.recipes.catalogue import recipe
    from consilium.training.precision import faster_dtype

    return place.dtype or say(
        "{dtype} (measured with {model})",
        dtype=faster_dtype(recipe("deepseek-v3", "tiny")),
        model="deepseek-v3:tiny",
    )


def _kernels(say: Say) -> str:
    from consilium.ops.native.library import Kernels, found

    kernels = found()
    if isinstance(kernels, Kernels):
        return say("native, {tier}", tier=kernels.tier)
    missing = {"reason": kernels.reason, "remedy": kernels.remedy}
    return say("none, a step of generation takes several times as long: {reason}; {remedy}", **missing)


def _extras(names: Iterable[str]) -> str:
    return ", ".join(filter(importlib.util.find_spec, names))


def _problems(say: Say) -> Iterator[str]:
    import torch

    from consilium.data.builtin.domains import available_domains
    from consilium.model.build import build
    from consilium.recipes import catalogue

    if shutil.disk_usage(".").free < LOW_DISK:
        yield say("less than 2 GiB of disk is free; a run of the demo needs about half of that.")
    try:
        available_domains()
    except ConsiliumError as error:
        yield str(error)
    with tempfile.TemporaryDirectory() as folder:
        if not os.access(Path(folder), os.W_OK):
            yield say("the temporary folder {folder} cannot be written; set TMPDIR.", folder=folder)
    output = build(catalogue.recipe("deepseek-v3", "tiny"))(torch.zeros(1, 8, dtype=torch.long))
    if not bool(torch.isfinite(output.logits).all()):
        yield say("a tiny model gives logits that are not finite: this build of torch is broken.")
