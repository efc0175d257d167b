"""``consilium bench``: run one benchmark, print and keep its record."""

from __future__ import annotations

import datetime as dt
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import consilium
from consilium.benchmarking import benchmarks
from consilium.cli.bench import NAMES
from consilium.errors import ConsiliumError, nearest
from consilium.machine.allocator import keep_memory
from consilium.machine.processors import cpu_name
from consilium.records.bench import BenchRecord, Figure
from consilium.records.io import to_json, write_json


def run(options: Namespace) -> int:
    keep_memory()
    if options.out is not None:
        refuse_unwritable(options.out)
    figures = _measure(options.name, options.against)()
    made = record(options.name, f"consilium {shlex.join(sys.argv[1:])}", figures)
    if options.out is not None:
        write_json(options.out, made)
    print(to_json(made, indent=None) if options.json else _table(made))
    return 0


def refuse_unwritable(path: Path) -> None:
    """Raise ConsiliumError before minutes of measuring whose record could not be kept."""
    if path.is_dir():
        raise ConsiliumError(f"bench: --out {path} is a folder; give the name of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConsiliumError(
            f"bench: cannot write {path}: {error.strerror or error}; choose another --out."
        ) from None


def record(name: str, command: str, figures: Sequence[Figure]) -> BenchRecord:
    """What was measured here and now."""
    return BenchRecord(
        name=name,
        machine=machine(),
        commit=commit(),
        command=command,
        date=dt.datetime.now(dt.UTC),
        figures=tuple(figures),
    )


def once(name: str, unit: str, value: float, against: tuple[str, float] | None = None) -> Figure:
    """One measurement, and what it is compared with."""
    return Figure(
        name=name,
        unit=unit,
        median=value,
        minimum=value,
        maximum=value,
        n=1,
        against=None if against is None else against[0],
        ratio=None if against is None else value / against[1],
    )


def machine() -> str:
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"


def _measure(name: str, against: str | None) -> Callable[[], tuple[Figure, ...]]:
    if name not in NAMES:
        raise ConsiliumError(f"unknown benchmark {name!r}.{nearest(name, NAMES)}")
    if name.startswith("train"):
        return lambda: benchmarks.training(name, against)
    if against is not None:
        raise ConsiliumError(f"bench: {name} has no rival to run; drop --against {against}.")
    if name.startswith("decode"):
        return lambda: benchmarks.decoding(name)
    return benchmarks.dense_against_moe


def _table(record: BenchRecord) -> str:
    lines = [f"{record.name} on {record.machine}"]
    for figure in record.figures:
        spread = f"{figure.minimum:,.0f} to {figure.maximum:,.0f}, n = {figure.n}"
        lines.append(f"  {figure.name:<44}{figure.median:>10,.0f} {figure.unit}   ({spread})")
        if figure.ratio is not None:
            lines.append(f"    {figure.ratio:.2f} times {figure.against}")
    return "\n".join(lines)


def commit() -> str:
    """The commit of a checkout; a wheel is known by its version."""
    git = shutil.which("git")
    if git is not None:
        where = Path(__file__).parent
        found = subprocess.run(  # noqa: S603 - asks git for the commit, without a shell
            [git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=where
        )
        if found.returncode == 0:
            return found.stdout.strip()
    return f"version {consilium.__version__}"
