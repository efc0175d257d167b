"""What was measured here and now, as a record that says on what machine and of which commit."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

import consilium
from consilium.machine.processors import cpu_name
from consilium.records.bench import BenchRecord, Figure


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


def several(
    name: str, unit: str, values: Sequence[float], against: tuple[str, Sequence[float]] | None = None
) -> Figure:
    """The median of some measurements, and the median of what it is compared with."""
    median = statistics.median(values)
    return Figure(
        name=name,
        unit=unit,
        median=median,
        minimum=min(values),
        maximum=max(values),
        n=len(values),
        against=None if against is None else against[0],
        ratio=None if against is None else median / statistics.median(against[1]),
    )


def machine() -> str:
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"


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
