"""What the exchange of rows costs a training step whose experts are dealt over two processes.

usage: python bench/processes.py [--rounds 3] [--steps 4] [--out bench/records/processes.json]

In each round two processes of one thread train with their experts dealt (EP2), plainly and in overlapping
halves, and one process of two threads trains the same batch. Beside the seconds that a step waits for rows
stands what the planner's bytes would take at the rate of a bare exchange of as many bytes, measured between
the steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from consilium.benchmarking.record import record
from consilium.config.model import MTP, Model
from consilium.config.training import Training
from consilium.data.batch import Batch
from consilium.machine.allocator import keep_memory
from consilium.parallel.group import Group
from consilium.parallel.launch import launch
from consilium.parallel.mesh import Mesh
from consilium.parallel.start import joined
from consilium.planner.exchange import balanced, exchange_bytes
from consilium.recipes import catalogue
from consilium.records.bench import Figure
from consilium.records.io import to_json, write_json
from consilium.training.optimizer import build_optimizer
from consilium.training.spread import drawn
from consilium.training.step import gradients, update

ROOT = Path(__file__).parents[1]
ROWS, LENGTH, PROCESSES = 4, 256, 2
"""Sequences of a micro-batch, and micro-batches of a step: one a process."""
MIB = 2**20

Found = dict[str, list[float]]


def model() -> Model:
    """A small DeepSeek-V3 without prediction modules, as wide as two cores bear."""
    tiny = dataclasses.replace(catalogue.recipe("deepseek-v3", "tiny"), mtp=MTP())
    assert tiny.moe is not None
    return tiny


def training(*, overlap: bool) -> Training:
    return Training(model=model(), steps=100, batch=ROWS * PROCESSES, accumulate=PROCESSES, overlap=overlap)


class Random:
    """Stands for the loader."""

    def micro(self, step: int, index: int, count: int) -> Batch:
        generator = torch.Generator().manual_seed(step * count + index)
        ids_BS = torch.randint(model().vocab_size, (ROWS, LENGTH), generator=generator)
        return Batch(
            ids_BS=ids_BS,
            targets_BS=ids_BS.roll(-1, 1),
            sequence_BS=torch.zeros_like(ids_BS),
            position_BS=torch.arange(LENGTH).expand_as(ids_BS),
            valid_BS=torch.ones_like(ids_BS, dtype=torch.bool),
        )


def steps(mesh: Mesh, count: int, *, overlap: bool) -> Found:
    """Of each step, after one to warm up: seconds, seconds in which it waited for rows, MiB sent."""
    config = training(overlap=overlap)
    built = drawn(config, mesh)
    optimizer = build_optimizer(built, config.optimizer, mesh.sharding)
    found: Found = {"seconds": [], "waited": [], "sent": []}
    for step in range(count + 1):
        mesh.ledger.clear()
        begun = time.perf_counter()
        update(built, optimizer, config, gradients(built, Random(), config, step, mesh), mesh)
        if step:
            found["seconds"].append(time.perf_counter() - begun)
            found["waited"].append(sum(map(sum, mesh.ledger.waited.values())))
            found["sent"].append(sum(map(sum, mesh.ledger.sent.values())) / MIB)
    return found


def bare(group: Group, size: int) -> float:
    """Seconds of an exchange of ``size`` bytes each way with nothing else to do."""
    rows_SB = torch.zeros(PROCESSES * size, 1, dtype=torch.uint8)
    times: list[float] = []
    for _ in range(5):
        begun = time.perf_counter()
        group.exchange(rows_SB, [size] * PROCESSES, [size] * PROCESSES, "bare").wait()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def planned() -> tuple[int, list[int]]:
    """Bytes of a step that the planner expects a process to send, and of each exchange in it."""
    config = model()
    assert config.moe is not None
    crossing = balanced(config.moe, ROWS * LENGTH, processes=PROCESSES)
    layer = exchange_bytes(config.moe, config.hidden_size, crossing, processes=PROCESSES)
    sizes = [layer.dispatch, layer.combine, layer.dispatch_back, layer.combine_back]
    layers = len(list(config.moe_layers))
    return layer.total * layers, sizes * layers


def child(count: int, expert: int, out: Path) -> int:
    keep_memory()
    with joined(expert=expert) as mesh:
        torch.set_num_threads(1 if expert > 1 else PROCESSES)
        found = {"plain": steps(mesh, count, overlap=False)}
        if expert > 1:
            found["overlapped"] = steps(mesh, count, overlap=True)
            found["bare"] = {"seconds": [sum(bare(mesh.expert, size) for size in planned()[1])]}
        if mesh.world.leads:
            out.write_text(json.dumps(found))
    return 0


def forked(work: Callable[[], int]) -> None:
    """One process, which may compute what it likes before others are forked from this one."""
    pid = os.fork()
    if not pid:
        os._exit(work())
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(f"a process of the bench ended with {os.waitstatus_to_exitcode(status)}")


def measured(rounds: int, count: int) -> dict[str, Found]:
    """All rounds together, by who ran."""
    every: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, expert in (("two", PROCESSES), ("one", 1)):
                out = Path(folder) / f"{name}.json"
                work = functools.partial(child, count, expert, out)
                if expert == 1:
                    forked(work)
                elif launch(PROCESSES, work):
                    raise SystemExit("a process of the bench failed")
                for kind, found in json.loads(out.read_text()).items():
                    for key, values in found.items():
                        every.setdefault(f"{name} {kind}", {}).setdefault(key, []).extend(values)
    return every


def figure(name: str, unit: str, values: Sequence[float], against: tuple[str, float] | None = None) -> Figure:
    median = statistics.median(values)
    rival, value = against or (None, None)
    return Figure(
        name=name,
        unit=unit,
        median=median,
        minimum=min(values),
        maximum=max(values),
        n=len(values),
        against=rival,
        ratio=None if value is None else median / value,
    )


def figures(every: dict[str, Found]) -> list[Figure]:
    tokens = ROWS * LENGTH * PROCESSES
    one = [tokens / s for s in every["one plain"]["seconds"]]
    two, halves = every["two plain"], every["two overlapped"]
    alone = ("one process, 2 threads", statistics.median(one))
    bare_seconds = every["two bare"]["seconds"]
    at_rate = ("the planner's bytes at the rate of a bare exchange", statistics.median(bare_seconds))
    plan = planned()[0] / MIB
    return [
        figure("one process, 2 threads", "tokens/s", one),
        figure("EP2, 2 processes", "tokens/s", [tokens / s for s in two["seconds"]], alone),
        figure("EP2, overlapped", "tokens/s", [tokens / s for s in halves["seconds"]], alone),
        figure(
            "EP2: sent by a process", "MiB a step", two["sent"], ("the planner, all choices as likely", plan)
        ),
        figure("the planner's bytes at the rate of a bare exchange", "s a step", bare_seconds),
        figure("EP2: waited for rows", "s a step", two["waited"], at_rate),
        figure("EP2, overlapped: waited for rows", "s a step", halves["waited"], at_rate),
        figure(
            "EP2: waited", "of a step", [w / s for w, s in zip(two["waited"], two["seconds"], strict=True)]
        ),
        figure(
            "EP2, overlapped: waited",
            "of a step",
            [w / s for w, s in zip(halves["waited"], halves["seconds"], strict=True)],
        ),
    ]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    found = record("processes", "python bench/processes.py", figures(measured(options.rounds, options.steps)))
    if options.out is not None:
        write_json(options.out, found)
    print(to_json(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
