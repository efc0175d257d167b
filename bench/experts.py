"""Forward and backward of one layer's experts on float32 masters: ways of torch's and the kernels, in turns.

usage: python bench/experts.py [--shapes NAME ...] [--turns 7] [--out RECORD.json]

The way that loops under autograd is left out: it has products of every number of rows, for which oneDNN
compiles anew and forgets those of the others. ``CONSILIUM_NATIVE=avx2`` measures the kernels of that tier;
with ATEN_CPU_CAPABILITY=avx2, MKL_ENABLE_INSTRUCTIONS=AVX2 and ONEDNN_MAX_CPU_ISA=AVX2 torch's ways are those
of a processor that has no more.

Legend: R rows, E experts, D hidden size, F width.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from consilium.benchmarking.record import record
from consilium.machine.allocator import keep_memory
from consilium.machine.processors import threads
from consilium.ops.grouped import Backend, stacked_feed_forward
from consilium.ops.native.compile import VARIABLE
from consilium.ops.native.library import kernels
from consilium.ops.weights import DenseStack
from consilium.records.bench import Figure
from consilium.records.io import to_json, write_json

TORCH: tuple[Backend, ...] = ("grouped", "padded", "loop")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIMITS = (VARIABLE, "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
"""What keeps kernels and torch from what the processor has."""
WARM_UP = 3


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
    "few": Shape(8, 4096, 256, 256, 0.2),
    "1b-short": Shape(64, 3072, 1024, 512, 0.2),
    "1b": Shape(64, 12288, 1024, 512, 0.2),
}


def steps(shape: Shape, dtype: torch.dtype) -> Mapping[Backend, Callable[[int], None]]:
    """One forward and backward by each way, on shared tensors; gradients are made anew as in training."""
    x = torch.randn(shape.rows, shape.hidden, dtype=dtype, requires_grad=True)
    up = torch.randn(shape.experts, 2 * shape.width, shape.hidden, requires_grad=True)
    down = torch.randn(shape.experts, shape.hidden, shape.width, requires_grad=True)
    grad = torch.randn_like(x)

    def step(backend: Backend, seed: int) -> None:
        x.grad = up.grad = down.grad = None
        stacks = DenseStack(up), DenseStack(down)
        stacked_feed_forward(x, shape.counts(seed), *stacks, "swiglu", backend).backward(grad)

    ways: tuple[Backend, ...] = TORCH if kernels() is None else (*TORCH, "native")
    return {backend: functools.partial(step, backend) for backend in ways}


def measure(shape: Shape, dtype: torch.dtype, turns: int) -> Mapping[Backend, Sequence[float]]:
    """Milliseconds by way."""
    runs = steps(shape, dtype)
    times: dict[Backend, list[float]] = {backend: [] for backend in runs}
    for turn in range(WARM_UP + turns):
        for backend, run in runs.items():
            start = time.perf_counter()
            run(turn)
            times[backend].append((time.perf_counter() - start) * 1e3)
    return {backend: values[WARM_UP:] for backend, values in times.items()}


def figures(name: str, times: Mapping[Backend, Sequence[float]]) -> Iterator[Figure]:
    best = min(TORCH, key=lambda backend: statistics.median(times[backend]))
    for backend, values in times.items():
        median, own = statistics.median(values), backend == "native"
        against = f"{name} {best}" if own else None
        ratio = median / statistics.median(times[best]) if own else None
        yield Figure(
            name=f"{name} {_label(backend)}",
            unit="ms",
            median=median,
            minimum=min(values),
            maximum=max(values),
            n=len(values),
            against=against,
            ratio=ratio,
        )


def _label(backend: Backend) -> str:
    here = kernels()
    return f"native, {here.tier}" if here is not None and backend == "native" else backend


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="NAME")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(threads())
    torch.manual_seed(0)
    found = [
        figure
        for name, dtype in itertools.product(options.shapes, options.dtypes)
        for figure in figures(f"{name} {dtype}", measure(SHAPES[name], DTYPES[dtype], options.turns))
    ]
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    given = {"shapes": (options.shapes, SHAPES), "dtypes": (options.dtypes, DTYPES)}
    chosen = [w for key, (own, all_) in given.items() if own != list(all_) for w in (f"--{key}", *own)]
    command = [*limits, "python", "bench/experts.py", *chosen, "--turns", str(options.turns)]
    made = record("experts", shlex.join(command), found)
    print(to_json(made))
    if options.out is not None:
        write_json(options.out, made)


if __name__ == "__main__":
    main()
