"""Forward and backward of one layer's experts, every backend in one run, interleaved.

``python bench/experts.py --threads 1 --repeats 6 --keep-memory --out record.json`` writes a bench record;
with ``--table`` it prints the rows of docs/decisions/0003-experts-backend.md instead of the record.

Legend: R rows, E experts, D hidden size, F width.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from consilium.benchmarking.record import record
from consilium.machine.allocator import keep_memory
from consilium.ops.grouped import Backend, stacked_feed_forward
from consilium.ops.weights import DenseStack
from consilium.records.bench import Figure
from consilium.records.io import to_json, write_json

BACKENDS: tuple[Backend, ...] = get_args(Backend)


@dataclass(frozen=True, slots=True)
class Shape:
    experts: int
    rows: int
    hidden: int
    width: int
    skew: float
    """Standard deviation of the logits that rows are drawn to experts by."""

    def counts(self, seed: int = 0) -> tuple[int, ...]:
        """Rows of each expert; as in training no two seeds give the same."""
        share = torch.softmax(
            torch.randn(self.experts, generator=torch.Generator().manual_seed(0)) * self.skew, 0
        )
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(share, self.rows, replacement=True, generator=generator)
        return tuple(torch.bincount(drawn, minlength=self.experts).tolist())


SHAPES = {
    "tiny": Shape(32, 8192, 192, 64, 0.2),
    "tiny-wide": Shape(32, 8192, 192, 128, 0.2),
    "tiny-skewed": Shape(32, 8192, 192, 64, 1.0),
    "1b-short": Shape(64, 3072, 1024, 512, 0.2),
    "1b": Shape(64, 12288, 1024, 512, 0.2),
}


def steps(shape: Shape, dtype: torch.dtype) -> dict[Backend, Callable[[int], None]]:
    """One forward and backward a backend, on shared tensors; gradients are made anew as in training."""
    x = torch.randn(shape.rows, shape.hidden, dtype=dtype, requires_grad=True)
    up = torch.randn(shape.experts, 2 * shape.width, shape.hidden, requires_grad=True)
    down = torch.randn(shape.experts, shape.hidden, shape.width, requires_grad=True)
    grad = torch.randn_like(x)

    def step(backend: Backend, seed: int) -> None:
        x.grad = up.grad = down.grad = None
        stacks = DenseStack(up), DenseStack(down)
        stacked_feed_forward(x, shape.counts(seed), *stacks, "swiglu", backend).backward(grad)

    return {backend: functools.partial(step, backend) for backend in BACKENDS}


def measure(shape: Shape, dtype: torch.dtype, repeats: int) -> dict[Backend, list[float]]:
    """Milliseconds of processor time by backend: it bears neighbours on the machine better than the clock."""
    runs = steps(shape, dtype)
    times: dict[Backend, list[float]] = {backend: [] for backend in runs}
    for repeat in range(repeats + 1):
        for backend, run in runs.items():
            start = time.process_time()
            run(repeat)
            if repeat:
                times[backend].append((time.process_time() - start) * 1e3)
    return times


def figures(name: str, times: dict[Backend, list[float]]) -> list[Figure]:
    rival = statistics.median(times["reference"])
    return [
        Figure(
            name=f"{name} {backend}",
            unit="ms of processor time",
            median=statistics.median(t),
            minimum=min(t),
            maximum=max(t),
            n=len(t),
            against="reference",
            ratio=statistics.median(t) / rival,
        )
        for backend, t in times.items()
    ]


def table_row(name: str, shape: Shape, times: dict[Backend, list[float]]) -> str:
    counts = shape.counts()
    busiest = max(counts) * shape.experts / shape.rows
    cells = [f"{min(times[backend]):.0f}" for backend in BACKENDS]
    sizes = f"{shape.experts}, {shape.rows}, {shape.hidden}, {shape.width}"
    return f"| {name} | {sizes} | {busiest:.1f} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--keep-memory", action="store_true", help="as training does")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kept = options.keep_memory and keep_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    times = {n: measure(SHAPES[n], getattr(torch, options.dtype), options.repeats) for n in options.shapes}
    made = record(
        f"experts {options.dtype}, memory {'kept' if kept else 'returned'}",
        shlex.join(["python", *sys.argv]),
        [figure for name, t in times.items() for figure in figures(name, t)],
    )
    rows = "\n".join(table_row(name, SHAPES[name], t) for name, t in times.items())
    print(rows if options.table else to_json(made))
    if options.out is not None:
        write_json(options.out, made)


if __name__ == "__main__":
    main()
