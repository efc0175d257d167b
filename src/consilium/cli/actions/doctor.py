"""``consilium doctor``: facts about the machine and what looks wrong, and whether every router is right."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

import consilium
from consilium.cli.table import columns
from consilium.conformance import suite as conformance
from consilium.conformance.suite import Verdict
from consilium.data.builtin.domains import available_domains
from consilium.errors import ConsiliumError
from consilium.machine.processors import cpu_name
from consilium.model.build import build
from consilium.recipes import catalogue
from consilium.training.precision import faster_dtype

LOW_DISK = 2 * 2**30


def machine(options: Namespace) -> int:
    """Print facts and problems; 1 when something is wrong."""
    facts, problems = dict(_facts()), list(_problems())
    if options.json:
        print(json.dumps({"facts": facts, "problems": problems}, indent=2))
        return 1 if problems else 0
    lines = [*facts.items(), *(("problem", problem) for problem in problems)]
    lines.append(("verdict", "see the problems above" if problems else "ready: try consilium demo"))
    for name, text in lines:
        print(f"{name:<12} {text}")
    return 1 if problems else 0


def routers(options: Namespace) -> int:
    """Run the golden vectors and print a line a system; 1 when a router decides anything else."""
    verdicts = [conformance.check(vectors) for vectors in conformance.shipped()]
    failed = not all(verdict.passed for verdict in verdicts)
    if options.json:
        print(
            json.dumps({"passed": not failed, "systems": [_data(verdict) for verdict in verdicts]}, indent=2)
        )
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


def _facts() -> Iterator[tuple[str, str]]:
    yield "consilium", consilium.__version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield (
        "torch",
        f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    )
    yield "processor", cpu_name()
    yield "accelerator", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    yield "fast dtype", f"{faster_dtype()} (measured)"
    yield "disk", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here"
    found = [name for name in ("transformers", "fastapi") if importlib.util.find_spec(name)]
    yield "extras", ", ".join(found) or "none installed, none needed"


def _problems() -> Iterator[str]:
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
