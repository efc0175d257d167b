"""A disk that fills up or fails at any step of a save: one sentence, and the checkpoint before is whole."""

from __future__ import annotations

import errno
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from consilium.checkpoint import store
from consilium.disk.atomic import latest, prune, sweep
from consilium.disk.files import DISK, Filesystem
from consilium.disk.manifest import verify
from consilium.errors import ConsiliumError
from disk.crashing import CrashingDisk
from small import DENSE, lively

MODEL = lively(DENSE)


def save(root: Path, step: int, files: Filesystem) -> None:
    """As a run does that keeps one: weights, their average, moments; then the step before goes."""
    state = store.TrainingState({"embed.weight:exp_avg": torch.full((40, 32), float(step))}, {"step": step})
    beside = {"average": store.Content.of(MODEL)}
    folder = root / f"step-{step}"
    store.save(MODEL, folder, training_state=state, beside=beside, files=files)
    prune(root, 1, current=folder, files=files)


def failure(root: Path, disk: Filesystem) -> str | None:
    """What a save of step 2 says where it fails."""
    try:
        save(root, 2, disk)
    except ConsiliumError as error:
        return str(error)
    return None


def held(root: Path) -> int:
    """The step of the newest checkpoint, all of whose files are as they were saved."""
    found = latest(root, check=verify)
    assert found is not None
    state = store.load_training_state(found)
    assert bool((state.tensors["embed.weight:exp_avg"] == state.scalars["step"]).all())
    return int(state.scalars["step"])


@pytest.mark.parametrize(("code", "lasting"), [(errno.ENOSPC, "full"), (errno.EIO, "once")])
def test_a_failure_at_any_step_of_a_save_leaves_the_checkpoint_before(
    code: int, lasting: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    (tmp_path / "begin").mkdir()
    save(tmp_path / "begin", 1, DISK)
    for at in itertools.count(1):
        root = Path(shutil.copytree(tmp_path / "begin", tmp_path / "copy"))
        disk = CrashingDisk(root, at=at, error=code, full=lasting == "full")
        said = failure(root, disk)
        disk.close()
        if said is None:
            break
        assert "cannot save to" in said
        assert "what was saved before is unchanged" in said
        sweep(root)
        assert held(root) in (1, 2)
        shutil.rmtree(root)
    assert held(root) == 2
    weights = store.load(root / "step-2/average").state_dict()
    assert all(torch.equal(weights[name], value) for name, value in MODEL.state_dict().items())
    assert at > 15
    record_property("trials", at - 1)
