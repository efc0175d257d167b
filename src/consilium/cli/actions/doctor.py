"""``consilium doctor``: facts about the machine, and what looks wrong."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

import consilium
from consilium.data.builtin import available_domains
from consilium.errors import ConsiliumError
from consilium.model.build import build
from consilium.recipes import catalogue
from consilium.training.precision import faster_dtype
from consilium.training.run import cpu_name

LOW_DISK = 2 * 2**30


def run(_options: Namespace) -> int:
    lines = list(_facts())
    for name, text in lines:
        print(f"{name:<12} {text}")
    problems = list(_problems())
    for problem in problems:
        print(f"{'problem':<12} {problem}")
    print(f"{'verdict':<12} {'see the problems above' if problems else 'ready: try consilium demo'}")
    return 1 if problems else 0


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
