"""What ``consilium generate RUN --max-tokens 1`` reads and how long it takes, now and at an earlier commit.

``python bench/loading.py --before CHECKOUT --out bench/records/loading.json``, where CHECKOUT is a work tree
of the earlier commit. The run is a dense model of one GiB in float32, and beside its weights lies the state
of the optimizer, twice as large. The two commits take turns, after one unmeasured pass over all files, so
that both read them from the system's memory where they fit.

Bytes are ``rchar`` of /proc/self/io: what the process asked of read and pread, cached or not. What is mapped
into memory instead does not count there, so the pages that the process touched for the first time, files and
memory of its own alike, stand beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from consilium.benchmarking.record import record
from consilium.checkpoint import store
from consilium.config.attention import GQA
from consilium.config.model import Model
from consilium.data.tokenizer import Tokenizer
from consilium.model.build import build
from consilium.recipes.catalogue import recipe
from consilium.records.bench import Figure
from consilium.records.io import to_json, write_json
from consilium.records.run import checkpoint_at

ROOT = Path(__file__).parents[1]
GIB = 2**30
CHILD = """
import resource, sys, time
start = time.perf_counter()
from consilium.cli.main import main
code = main(["generate", sys.argv[1], "--prompt", "a", "--max-tokens", "1"])
seconds = time.perf_counter() - start
read = int(open("/proc/self/io").read().split("rchar: ")[1].split()[0])
used = resource.getrusage(resource.RUSAGE_SELF)
touched = (used.ru_minflt + used.ru_majflt) * resource.getpagesize()
print(f"\\n{code} {seconds} {used.ru_utime + used.ru_stime} {read} {touched}")
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    seconds: float
    processor: float
    """Seconds of the processor, which bear neighbours on the machine better than the clock."""
    read: float
    """GiB through read and pread."""
    touched: float
    """GiB of pages touched for the first time."""


def gibibyte() -> Model:
    """A LLaMA of 268 million parameters."""
    config = recipe("llama:tiny")
    assert isinstance(config.attention, GQA)
    assert config.dense is not None
    attention = dataclasses.replace(config.attention, heads=16, kv_heads=16, head_dim=64)
    dense = dataclasses.replace(config.dense, width=2816)
    return dataclasses.replace(
        config, vocab_size=259, hidden_size=1024, layers=21, attention=attention, dense=dense
    )


def make(run: Path) -> tuple[int, int]:
    """Write a run's checkpoint; return the bytes of its weights and of all its files."""
    folder = checkpoint_at(run, 1)
    model = build(gibibyte(), seed=0)
    weights = dict(model.named_parameters())
    tensors = {f"{kind}.{name}": torch.zeros_like(w) for name, w in weights.items() for kind in ("m", "v")}
    state = store.TrainingState(tensors=tensors, scalars={"step": 1})
    store.save(model, folder, tokenizer=Tokenizer.of_bytes(), training_state=state)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return (folder / "model.safetensors").stat().st_size, sum(path.stat().st_size for path in files)


def warm(run: Path) -> None:
    """Read every file once, a piece at a time."""
    for path in run.rglob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def once(source: Path, run: Path) -> Cost:
    """Run the version at ``source`` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode or not done.stdout:
        raise RuntimeError(f"{source}: {done.stderr}")
    code, seconds, processor, read, touched = done.stdout.split()[-5:]
    if code != "0":
        raise RuntimeError(f"{source}: {done.stderr}")
    return Cost(float(seconds), float(processor), int(read) / GIB, int(touched) / GIB)


def figures(before: Sequence[Cost], after: Sequence[Cost]) -> list[Figure]:
    kinds: tuple[tuple[str, str, Callable[[Cost], float]], ...] = (
        ("time", "s", lambda cost: cost.seconds),
        ("processor time", "s", lambda cost: cost.processor),
        ("bytes read", "GiB", lambda cost: cost.read),
        ("pages touched", "GiB", lambda cost: cost.touched),
    )
    return [
        one
        for what, unit, of in kinds
        for one in pair(what, unit, list(map(of, before)), list(map(of, after)))
    ]


def pair(what: str, unit: str, before: Sequence[float], after: Sequence[float]) -> tuple[Figure, Figure]:
    rival = figure(f"{what}, before", unit, before)
    now = figure(f"{what}, now", unit, after)
    return dataclasses.replace(now, against="before", ratio=now.median / rival.median), rival


def figure(name: str, unit: str, values: Sequence[float]) -> Figure:
    middle = statistics.median(values)
    return Figure(
        name=name, unit=unit, median=middle, minimum=min(values), maximum=max(values), n=len(values)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as parent:
        run = Path(parent) / "run"
        weights, size = make(run)
        warm(run)
        pairs = [(once(options.before, run), once(ROOT, run)) for _ in range(options.repeats)]
    before, after = zip(*pairs, strict=True)
    made = record("loading", "python bench/loading.py --before CHECKOUT", figures(before, after))
    print(to_json(made))
    print(f"{weights / GIB:.2f} GiB of weights, {size / GIB:.2f} GiB in all", file=sys.stderr)
    if options.out is not None:
        write_json(options.out, made)


if __name__ == "__main__":
    main()
