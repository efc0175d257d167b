"""A save may stop, fail or lose power after any operation, and the old or the new checkpoint is whole."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.crashing import LOSSES, Crash, CrashingDisk, Loss
from consilium.disk.atomic import commit_folder, latest, prune, recover, sweep, verify
from consilium.disk.files import DISK, Filesystem
from consilium.errors import ConsiliumError

Scenario = Callable[[Path, Filesystem], None]


def fill(folder: Path, version: str, files: Filesystem) -> None:
    files.write(folder / "model.safetensors", [f"weights {version}".encode(), b"." * 64])
    files.make_folder(folder / "training_state")
    files.write(folder / "training_state" / "state.json", [version.encode()])


def commit(destination: Path, version: str, files: Filesystem = DISK) -> None:
    commit_folder(destination, lambda folder: fill(folder, version, files), files=files)


def rotate(root: Path, files: Filesystem) -> None:
    """Save step 2 and remove step 1."""
    commit(root / "step-2", "2", files)
    prune(root, 1, current=root / "step-2", files=files)


def replace(root: Path, files: Filesystem) -> None:
    """Save over step 1."""
    commit(root / "step-1", "2", files)


def operations(scenario: Scenario, root: Path) -> int:
    disk = CrashingDisk(root, at=10**9)
    scenario(root, disk)
    disk.close()
    return disk.count


def held(folder: Path) -> str:
    """The version in ``folder``, which must be whole and of one save."""
    verify(folder)
    version = (folder / "training_state" / "state.json").read_text()
    assert (folder / "model.safetensors").read_text().startswith(f"weights {version}.")
    return version


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of checkpoints with step 1 in it, below one that is already durable."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    commit(folder / "step-1", "1")
    return folder


def fresh(root: Path, scenario: Scenario, tmp_path: Path) -> tuple[int, Callable[[], Path]]:
    """The operations of ``scenario`` and a function that makes new copies of ``root``."""
    original = tmp_path / "original"
    shutil.copytree(root, original)
    numbers = iter(range(10**6))

    def copy() -> Path:
        return Path(shutil.copytree(original, tmp_path / f"copy-{next(numbers)}"))

    return operations(scenario, copy()), copy


@pytest.mark.parametrize("scenario", [rotate, replace])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_crash_after_any_operation_leaves_the_old_or_the_new_one(
    scenario: Scenario, loss: Loss, root: Path, tmp_path: Path
) -> None:
    count, copy = fresh(root, scenario, tmp_path)
    assert count > 20
    seen: set[str] = set()
    for at in range(1, count + 1):
        disk = CrashingDisk(copy(), at=at)
        with pytest.raises(Crash):
            scenario(disk.root, disk)
        after = disk.after(loss, tmp_path / f"after-{at}")
        disk.close()
        recover(after / "step-1")
        found = latest(after)
        assert found is not None
        seen.add(held(found))
        sweep(after)
        assert {path.name for path in after.iterdir()} <= {"step-1", "step-2"}
        assert {held(path) for path in after.iterdir()} <= {"1", "2"}
    assert seen == {"1", "2"}


@pytest.mark.parametrize("name", ["step-1", "step-2"])
def test_a_save_that_returned_survives_power_loss(name: str, root: Path, tmp_path: Path) -> None:
    disk = CrashingDisk(root, at=10**9)
    commit(root / name, "2", disk)
    disk.close()
    assert held(disk.after("everything", tmp_path / "after") / name) == "2"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("lasting", ["once", "full"])
@pytest.mark.parametrize("scenario", [rotate, replace])
def test_a_failure_of_any_operation_is_one_sentence_and_loses_nothing(
    scenario: Scenario, lasting: str, code: int, root: Path, tmp_path: Path
) -> None:
    count, copy = fresh(root, scenario, tmp_path)
    for at in range(1, count + 1):
        disk = CrashingDisk(copy(), at=at, error=code, full=lasting == "full")
        with pytest.raises(ConsiliumError, match=f"cannot save to {disk.root}") as caught:
            scenario(disk.root, disk)
        assert "\n" not in str(caught.value)
        disk.close()
        sweep(disk.root)
        found = latest(disk.root)
        assert found is not None
        assert held(found) in {"1", "2"}
        assert {path.name for path in disk.root.iterdir()} <= {"step-1", "step-2"}


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (errno.ENOSPC, "no space left on the disk"),
        (errno.EACCES, "no permission to write"),
        (errno.EIO, "input/output error"),
    ],
)
def test_the_sentence_says_why_and_nothing_half_written_stays(code: int, why: str, root: Path) -> None:
    disk = CrashingDisk(root, at=4, error=code)
    with pytest.raises(ConsiliumError, match=why):
        commit(root / "step-2", "2", disk)
    disk.close()
    assert [path.name for path in root.iterdir()] == ["step-1"]


def test_a_failed_replacement_puts_the_old_folder_back(root: Path, tmp_path: Path) -> None:
    count, copy = fresh(root, replace, tmp_path)
    for at in range(1, count + 1):
        disk = CrashingDisk(copy(), at=at, error=errno.ENOSPC)
        with pytest.raises(ConsiliumError):
            replace(disk.root, disk)
        disk.close()
        assert (disk.root / "step-1").exists()
        assert held(disk.root / "step-1") in {"1", "2"}
