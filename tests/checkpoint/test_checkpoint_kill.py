"""kill -9 at random moments of saving and rotating: nothing lost, nothing torn, nothing mixed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from consilium.checkpoint import safetensors_io
from consilium.disk.atomic import commit_folder, latest, prune, sweep, verify
from consilium.disk.files import DISK

LONGEST_SECONDS = 0.04


def save(root: Path, step: int) -> None:
    """Five files that all say ``step``, then the removal of older steps: one or two are kept, in turn."""

    def write(folder: Path) -> None:
        weights = {f"layers.{i}.weight": torch.full((64, 512), float(step)) for i in range(4)}
        safetensors_io.write_sharded(folder, weights, shard_bytes=300_000)
        (folder / "training_state").mkdir()
        moments = {"moments": torch.full((256, 512), float(step))}
        safetensors_io.write(folder / "training_state" / "state.safetensors", moments)
        DISK.write(folder / "training_state" / "state.json", [json.dumps({"step": step}).encode()])

    commit_folder(root / f"step-{step}", write)
    prune(root, 1 + step % 2)


def held(folder: Path) -> int:
    """The step that every file of ``folder`` agrees on."""
    verify(folder)
    steps = {json.loads((folder / "training_state" / "state.json").read_text())["step"]}
    for file in folder.rglob("*.safetensors"):
        steps |= {int(value) for tensor in safetensors_io.read(file).values() for value in tensor.unique()}
    assert len(steps) == 1, steps
    return steps.pop()


def saved_before_the_kill(root: Path, first: int, seconds: float) -> int:
    """Let a child save steps from ``first`` on, kill it after ``seconds``, return the last it reported."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for step in range(first, first + 10_000):
                save(root, step)
                os.write(writer, step.to_bytes(4, "little"))
        finally:
            os._exit(1)
    os.close(writer)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        reports = pipe.read()
    return int.from_bytes(reports[-4:], "little") if reports else first - 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "kills", [200, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_every_kill_leaves_a_whole_checkpoint_not_older_than_the_last_report(
    kills: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("trials", kills)
    save(tmp_path, 1)
    torch.set_num_threads(1)
    moments = random.Random(0)
    last = 1
    during_a_save = 0
    for _ in range(kills):
        reported = saved_before_the_kill(tmp_path, last + 1, moments.uniform(0, LONGEST_SECONDS))
        during_a_save += any("." in path.name for path in tmp_path.iterdir())
        found = latest(tmp_path)
        assert found is not None
        last = held(found)
        assert last in {reported, reported + 1}
        sweep(tmp_path)
        assert found in set(tmp_path.iterdir())
        assert all("." not in path.name for path in tmp_path.iterdir())
    assert during_a_save > kills / 10
