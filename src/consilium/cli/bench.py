"""``consilium bench``: measure speed on this machine, beside a rival where one is asked for."""

from __future__ import annotations

import datetime
import os
import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from consilium.cli import benchmarks
from consilium.cli.arguments import json_flag
from consilium.errors import ConsiliumError, nearest
from consilium.ops.allocator import keep_memory
from consilium.records.bench import BenchRecord, Figure
from consilium.records.io import to_json, write_json
from consilium.training.run import cpu_name

NAMES = ("train-tiny", "train-1b", "dense-against-moe", "decode-tiny", "decode-1b")


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="train-tiny", metavar="NAME", help=f"{', '.join(NAMES)}")
    parser.add_argument("--against", choices=("transformers",), help="measure the rival in the same run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the record there")
    json_flag(parser)


def run(options: Namespace) -> int:
    keep_memory()
    record = BenchRecord(
        name=options.name,
        machine=f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}",
        commit=_commit(),
        command=f"consilium {shlex.join(sys.argv[1:])}",
        date=datetime.datetime.now(datetime.UTC),
        figures=_measure(options.name, options.against)(),
    )
    if options.out is not None:
        write_json(options.out, record)
    print(to_json(record, indent=None) if options.json else _table(record))
    return 0


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


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
