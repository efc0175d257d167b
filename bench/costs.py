"""What a training step costs beside its products: memory beyond the weights' own, and the record of routing.

usage: python bench/costs.py [--shape train-1b] [--steps 30] [--out bench/records/costs.json]

Memory: each contestant trains two steps of the same shape in a process of its own, and torch's profiler
counts the tensors of the second: those that live between its two passes, and the most at any time beyond
what it began with (weights, gradients, moments). Recording: a run of the small model writes its metrics
and loads as every run does, and what is spent on counting, entropies and files is held against the time
of its steps.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from consilium.benchmarking.benchmarks import ours, shapes, transformers
from consilium.benchmarking.record import once, record
from consilium.config.data import Data
from consilium.config.training import Bytes, Training
from consilium.evaluation.loads import LoadCounter
from consilium.moe import balance
from consilium.moe.types import Routing
from consilium.planner.parameters import parameters
from consilium.recipes import catalogue
from consilium.records.bench import Figure
from consilium.records.io import to_json, write_json
from consilium.training import loop
from consilium.training.events import Event, Stepped
from consilium.training.files import RunFiles
from consilium.training.loop import train

GIB = 2**30
OURS = "consilium"
BETWEEN = "between the passes"


@dataclass(frozen=True, slots=True)
class Memory:
    """GiB of tensors."""

    between: float
    """Live between the two passes, beside weights and moments."""
    most: float
    """Live at any time beyond weights, gradients and moments."""


def contestants(name: str) -> dict[str, Callable[[], object]]:
    """Built only when asked for: two models do not share a process."""
    shape = shapes()[name]
    theirs = ("grouped_mm fp32", "grouped_mm bf16 autocast")
    return {
        OURS: lambda: ours(shape),
        **{f"transformers {kind}": functools.partial(_theirs, shape, kind) for kind in theirs},
    }


def _theirs(shape: Any, kind: str) -> Callable[[], int]:
    return next(run for label, run in transformers(shape).items() if label.endswith(kind))


def memory(name: str, contestant: str) -> Memory:
    """Of a second step in this process, by the allocations that torch's profiler sees."""
    torch.set_num_threads(2)
    step = contestants(name)[contestant]()
    assert callable(step)
    step()
    backward = torch.Tensor.backward

    def marked(*args: Any, **options: Any) -> None:
        with record_function(BETWEEN):
            pass
        backward(*args, **options)

    watched = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with patch.object(torch.Tensor, "backward", marked), watched as seen:
        step()
    assert seen.profiler is not None
    gradients = 4 * parameters(shapes()[name].model).total
    return _memory(seen.profiler.kineto_results.events(), gradients)


def _memory(events: Sequence[Any], gradients: int) -> Memory:
    """Of the allocations of a step; that it gives back the gradients of the step before is not among them."""
    kept = most = live = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == BETWEEN:
            kept = live
        elif event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return Memory(kept / GIB, (most - gradients) / GIB)


def memories(name: str) -> Iterator[Figure]:
    found: dict[str, Memory] = {}
    for contestant in contestants(name):
        done = subprocess.run(
            [sys.executable, __file__, "--shape", name, "--memory", contestant],
            capture_output=True,
            text=True,
            check=True,
        )
        found[contestant] = Memory(*json.loads(done.stdout.splitlines()[-1]))
    for kind, what in (
        ("between", "kept between the passes"),
        ("most", "most beyond weights, gradients, moments"),
    ):
        values = {label: getattr(memory, kind) for label, memory in found.items()}
        least = min((value, label) for label, value in values.items() if label != OURS)
        for label, value in values.items():
            single = once(f"{label}: {what}", "GiB", value)
            rival = {"against": least[1], "ratio": value / least[0]} if label == OURS else {}
            yield replace(single, **rival)


@dataclass
class Clock:
    """Seconds inside the functions that it wraps, counted once where they nest."""

    seconds: float = 0.0
    inside: list[str] = field(default_factory=list)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            self.inside.append(function.__name__)
            begun = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.inside.pop()
                self.seconds += 0.0 if self.inside else time.perf_counter() - begun

        return timed


RECORDING: tuple[tuple[Any, str], ...] = (
    (balance, "entropy"),
    (Routing, "load_E"),
    (Routing, "wanted_E"),
    (LoadCounter, "add"),
    (LoadCounter, "result"),
    (loop, "step_record"),
    (loop, "bias_spread"),
    (RunFiles, "log"),
    (RunFiles, "log_loads"),
    (RunFiles, "sync"),
)
"""Everything that only looks at a step, though balance reads some of its counts too."""


def recording(steps: int) -> Figure:
    """Share of the time of a step, each step one value."""
    clock, shares = Clock(), list[float]()
    marks = [time.perf_counter(), 0.0]

    def heard(event: Event) -> None:
        if isinstance(event, Stepped):
            now = time.perf_counter()
            shares.append((clock.seconds - marks[1]) / (now - marks[0]))
            marks[:] = now, clock.seconds

    config = Training(
        model=catalogue.recipe("deepseek-v3", "tiny"),
        tokenizer=Bytes(),
        data=Data(sequence_length=256),
        steps=steps,
        batch=8,
        eval_tokens=1024,
    )
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for where, name in RECORDING:
            stack.enter_context(patch.object(where, name, clock.around(getattr(where, name))))
        train(config, Path(folder) / "run", listeners=(heard,))
    return Figure(
        name="recording of loads, entropies and metrics",
        unit="of a step",
        median=statistics.median(shares[1:]),
        minimum=min(shares[1:]),
        maximum=max(shares[1:]),
        n=len(shares) - 1,
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=tuple(shapes()), default="train-1b")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--memory", metavar="CONTESTANT", help="only print that of one, of this process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.memory:
        found = memory(options.shape, options.memory)
        print(json.dumps([found.between, found.most]))
        return 0
    counted = once("parameters", "millions", parameters(shapes()[options.shape].model).total / 1e6)
    figures = [counted, *memories(options.shape), recording(options.steps)]
    found = record("costs", f"python bench/costs.py --shape {options.shape}", figures)
    if options.out is not None:
        write_json(options.out, found)
    print(to_json(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
