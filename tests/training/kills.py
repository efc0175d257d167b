"""Kill training runs with SIGKILL at random moments, let each go on, and print how they ended as JSON.

usage: kills.py FOLDER TEXT STOPS CHAINED CELL ... One process imports torch once and forks every run. A CELL
is a kind of optimizer, a dtype and a topology such as ``muon-bfloat16-dp2ep2``. STOPS runs of each are killed
once, and one more CHAINED times: all of its processes in one moment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from consilium.checkpoint import store
from consilium.config.balance import AdaptiveLoss, Balance, PIDBias
from consilium.config.data import Data, TextPath
from consilium.config.model import MTP, Model
from consilium.config.moe import Capacity
from consilium.config.optimizer import AdamW, BlockState, Exponential, LinearRamp, Muon, Optimizer, Spikes
from consilium.config.router import Jitter
from consilium.config.training import Bytes, Training
from consilium.disk import atomic
from consilium.parallel.launch import launch
from consilium.parallel.start import joined
from consilium.parallel.topology import Topology
from consilium.records.run import CHECKPOINTS
from consilium.training.loop import train
from consilium.training.optimizer import build_optimizer
from small import DEEPSEEK

LONGEST_RUN = 120.0
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": AdamW(),
    "int8": AdamW(state=BlockState(block=64, smallest=64)),
    "muon": Muon(router_learning_rate=1e-3),
}
TOPOLOGIES = {
    "alone": Topology(),
    "dp2": Topology(data=2),
    "ep2": Topology(expert=2),
    "dp2ep2": Topology(data=2, expert=2),
}


def model(topology: Topology) -> Model:
    """One of everything that is state: a bias with a memory, a coefficient that moves, noise, two losses.

    Over processes without the dense block, which is state like all else and takes their time.
    """
    assert DEEPSEEK.moe is not None
    router = dataclasses.replace(DEEPSEEK.moe.router, noise=Jitter(epsilon=0.1))
    balance = Balance(losses=(AdaptiveLoss(start=0.5, most=1.0, slope=0.3, momentum=0.75),), bias=PIDBias())
    moe = dataclasses.replace(DEEPSEEK.moe, router=router, balance=balance, admission=Capacity(factor=1.0))
    dense = int(topology.world == 1)
    return dataclasses.replace(DEEPSEEK, layers=1 + dense, dense_first=dense, mtp=MTP(depth=1), moe=moe)


def configuration(text: Path, cell: str) -> Training:
    kind, dtype, place = cell.split("-")
    topology = TOPOLOGIES[place]
    rows = max(4, 2 * topology.world)
    return Training(
        model=model(topology),
        tokenizer=Bytes(),
        data=Data(sources=(TextPath(path=str(text)),), sequence_length=24),
        steps=8 if topology.world == 1 else 5,
        batch=rows,
        accumulate=2,
        save_every=2,
        eval_every=5,
        eval_tokens=64,
        optimizer=OPTIMIZERS[kind],
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        ramp=LinearRamp(start=rows // 2, share=0.5),
        average=Exponential(decay=0.7),
        spikes=Spikes(action="skip", window=16),
    )


def started(topology: Topology, config: Training, out: Path) -> int:
    """Start a run, or go on with it, in a new process group whose number it returns.

    Several processes are forked as ``train --nproc`` does it.
    """

    def member() -> int:
        with joined(expert=topology.expert) as mesh:
            train(config, out, resume=True, mesh=mesh)
        return 0

    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            code = member() if topology.world == 1 else launch(topology.world, member)
        except BaseException:  # noqa: BLE001 - the parent judges by the exit code
            traceback.print_exc()
        finally:
            os._exit(code)
    with contextlib.suppress(OSError):  # the child was faster
        os.setpgid(child, child)
    return child


def outcome(child: int, seconds: float) -> int | None:
    """Exit code of a child that ended within ``seconds``, else None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def fingerprint(out: Path) -> str:
    """Hash of the last checkpoint's weights, averages and training state, of metrics and load matrices."""
    folder = atomic.latest(out / CHECKPOINTS)
    assert folder is not None
    digest = hashlib.sha256()
    for path in sorted(folder.glob("**/model*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    state = store.load_training_state(folder)
    for name, tensor in sorted(state.tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    digest.update(json.dumps(dict(state.scalars), sort_keys=True).encode())
    digest.update((out / "routing/loads.bin").read_bytes())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("train/tok_per_sec", None)
    digest.update(json.dumps(lines, sort_keys=True).encode())
    return digest.hexdigest()


@dataclasses.dataclass
class Trial:
    """A cell: its whole run, and what a run that was killed is compared with."""

    config: Training
    folder: Path
    topology: Topology
    chance: random.Random

    def __post_init__(self) -> None:
        begun = time.monotonic()
        assert outcome(started(self.topology, self.config, self.folder / "whole"), LONGEST_RUN) == 0
        self.typical = time.monotonic() - begun
        self.expected = fingerprint(self.folder / "whole")

    def killed(self, name: str, kills: int) -> bool:
        """Kill a run so many times and let it end; whether it is the whole run then."""
        out, landed = self.folder / name, 0
        code: int | None = None
        while code is None:
            # What is written, and what goes on meanwhile, is no part of a run's result.
            alone = self.topology.world == 1
            saving = self.chance.choice(["blocking", "background"]) if alone else "blocking"
            ended, held = os.pipe()
            child = started(self.topology, dataclasses.replace(self.config, saving=saving), out)
            os.close(held)
            moment = self.chance.uniform(0, self.typical * (0.9 if kills == 1 else 0.5))
            code = outcome(child, moment if landed < kills else LONGEST_RUN)
            if code is None:
                assert landed < kills, "a run hangs"
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                os.read(ended, 1)  # every process of the run holds the other end
                landed += 1
            os.close(ended)
        return code == 0 and fingerprint(out) == self.expected


def trials(cell: str, text: Path, folder: Path, *, stops: int, chained: int) -> dict[str, int]:
    topology = TOPOLOGIES[cell.split("-")[2]]
    trial = Trial(configuration(text, cell), folder / cell, topology, random.Random(cell))
    ends = [trial.killed(f"stop-{i}", 1) for i in range(stops)]
    if chained:
        ends.append(trial.killed("chain", chained))
    return {"runs": len(ends), "wrong": ends.count(False)}


def main() -> None:
    folder, text, stops, chained, *cells = sys.argv[1:]
    torch.set_num_threads(1)
    build_optimizer(torch.nn.Linear(1, 1), AdamW())  # torch imports its compiler now, not in every child
    found = {
        cell: trials(cell, Path(text), Path(folder), stops=int(stops), chained=int(chained)) for cell in cells
    }
    # The output of this script is its result.
    print(json.dumps(found))


if __name__ == "__main__":
    main()
