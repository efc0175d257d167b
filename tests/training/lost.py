"""Lose one process of a run at random moments, let the run go on, and print how all that ended as JSON.

usage: lost.py FOLDER TEXT TRIALS TOPOLOGY ... Every other trial kills the process, others stop it (SIGSTOP).
Each is a ``consilium train --nproc`` of its own, forked from this process, which imports torch once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import torch

from consilium.cli.main import main as consilium
from consilium.config import io
from consilium.config.optimizer import AdamW
from consilium.disk import atomic
from consilium.disk.manifest import verify
from consilium.parallel.environment import LIMIT
from consilium.parallel.topology import Topology
from consilium.records.run import CHECKPOINTS
from consilium.training.optimizer import build_optimizer
from training.kills import LONGEST_RUN, TOPOLOGIES, configuration, fingerprint, outcome

SECONDS = 4.0
"""That a collective may take, beside which the others have two to look around and to end."""
TO_END = 2.0
STEPS = 12


@dataclasses.dataclass
class Command:
    """``consilium train`` over processes, what it says kept in a file beside ``out``."""

    settings: Path
    topology: Topology
    out: Path

    @property
    def said(self) -> Path:
        return self.out.with_suffix(".txt")

    def start(self) -> int:
        child = os.fork()
        if child:
            return child
        with self.said.open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        processes, shared = str(self.topology.world), str(self.topology.expert)
        words = ["train", str(self.settings), "--out", str(self.out), "--resume"]
        os._exit(consilium([*words, "--nproc", processes, "--ep", shared]))

    def reached(self, step: int, child: int) -> list[int]:
        """Wait until so many steps are on record; the processes, by rank."""
        until, metrics = time.monotonic() + LONGEST_RUN, self.out / "metrics.jsonl"
        while time.monotonic() < until:
            if metrics.exists() and metrics.read_bytes().count(b"train/loss") >= step:
                break
            time.sleep(0.002)
        return [int(pid) for pid in Path(f"/proc/{child}/task/{child}/children").read_text().split()]


def seconds_until_gone(processes: list[int]) -> float:
    begun = time.monotonic()
    while any(Path(f"/proc/{pid}").exists() for pid in processes) and time.monotonic() < begun + LONGEST_RUN:
        time.sleep(0.005)
    return time.monotonic() - begun


def lose(command: Command, how: signal.Signals, rank: int, moment: tuple[int, float]) -> str:
    """Take ``rank`` from a run so many seconds after a step; what went wrong then, "" where nothing did."""
    child = command.start()
    ranks = command.reached(moment[0], child)
    code = outcome(child, moment[1])
    if code is not None:
        return f"ended with {code} by itself"
    os.kill(ranks[rank], how)
    took = seconds_until_gone([pid for pid in ranks if pid != ranks[rank]])
    code = outcome(child, LONGEST_RUN)
    told = re.findall(r"rank ([\d, ]+) did not answer in the collective '", command.said.read_text())
    if code in (None, 0):
        return f"exit code {code}"
    if str(rank) not in told or not all(str(rank) in names.split(", ") for names in told):
        return f"rank {rank} was lost, and named were {told}"
    return "" if took < SECONDS + TO_END else f"the others took {took:.1f} s"


def trial(command: Command, expected: str, typical: float, chance: random.Random, how: signal.Signals) -> str:
    """What is wrong with a run that lost a process and then went on; a step takes ``typical`` seconds."""
    rank = chance.randrange(command.topology.world)
    moment = chance.randint(1, STEPS - 2), chance.uniform(0, typical)
    where = f"{command.out.name}, {how.name} of rank {rank} {moment[1]:.2f} s after step {moment[0]}"
    if fault := lose(command, how, rank, moment):
        return f"{where}: {fault}"
    for _, checkpoint in atomic.steps(command.out / CHECKPOINTS):
        verify(checkpoint)
    code = outcome(command.start(), LONGEST_RUN)
    same = code == 0 and fingerprint(command.out) == expected
    return "" if same else f"{where}: went on to another end, exit code {code}"


def trials(name: str, text: Path, folder: Path, count: int) -> list[str]:
    topology, settings = TOPOLOGIES[name], folder / f"{name}.yaml"
    config = dataclasses.replace(configuration(text, f"muon-float32-{name}"), steps=STEPS)
    settings.write_text(io.to_yaml(config))
    whole = Command(settings, topology, folder / f"{name}-whole")
    child = whole.start()
    whole.reached(1, child)
    begun = time.monotonic()
    assert outcome(child, LONGEST_RUN) == 0, whole.said.read_text()
    typical, expected = (time.monotonic() - begun) / STEPS, fingerprint(whole.out)
    chance, hows = random.Random(name), (signal.SIGKILL, signal.SIGSTOP)
    commands = (Command(settings, topology, folder / f"{name}-{i}") for i in range(count))
    return [trial(one, expected, typical, chance, hows[i % 2]) for i, one in enumerate(commands)]


def main() -> None:
    folder, text, count, *names = sys.argv[1:]
    os.environ[LIMIT] = str(SECONDS)
    torch.set_num_threads(1)
    build_optimizer(torch.nn.Linear(1, 1), AdamW())  # torch imports its compiler now, not in every child
    # The output of this script is its result.
    print(json.dumps({name: trials(name, Path(text), Path(folder), int(count)) for name in names}))


if __name__ == "__main__":
    main()
