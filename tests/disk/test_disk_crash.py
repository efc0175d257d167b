"""A write may stop, fail or lose power after any operation, and the old or the new version is whole."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from checkpoint.gguf_models import llama
from checkpoint.models import saved
from consilium.disk.files import DISK
from consilium.errors import ConsiliumError
from disk.crashing import LOSSES, Crash, CrashingDisk
from disk.writers import NAMES, Writer, writers

BEGINS = ("absent", "old")
PLACE = "new/place"


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Writer]:
    return writers(saved(tmp_path_factory.mktemp("gguf") / "model", llama()))


@dataclass(frozen=True)
class Trial:
    """One writer and fresh copies of the folder that it begins in."""

    writer: Writer
    begin: Path
    scratch: Path
    numbers: Iterator[int]

    def copy(self) -> Path:
        return Path(shutil.copytree(self.begin, self.scratch / f"copy-{next(self.numbers)}"))

    @property
    def operations(self) -> int:
        disk = CrashingDisk(self.copy(), at=10**9)
        self.writer.write(disk.root / PLACE, disk)
        disk.close()
        return disk.count


@pytest.fixture(params=[(name, begin) for name in NAMES for begin in BEGINS], ids="-".join)
def trial(request: pytest.FixtureRequest, known: dict[str, Writer], tmp_path: Path) -> Trial:
    name, begin = request.param
    (tmp_path / "begin").mkdir()
    if begin == "old":
        known[name].first(tmp_path / "begin" / PLACE)
    return Trial(known[name], tmp_path / "begin", tmp_path, iter(range(10**6)))


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.rglob("*") if ".tmp-" in path.name or ".old-" in path.name]


def test_a_crash_after_any_operation_leaves_the_old_or_the_new_version(trial: Trial) -> None:
    before = trial.writer.read(trial.begin / PLACE)
    count = trial.operations
    seen: set[str | None] = set()
    for at in range(1, count + 1):
        disk = CrashingDisk(trial.copy(), at=at)
        with pytest.raises(Crash):
            trial.writer.write(disk.root / PLACE, disk)
        for loss in LOSSES:
            after = disk.after(loss, trial.scratch / f"{at}-{loss}")
            content = {path: path.stat().st_mtime_ns for path in after.rglob("*")}
            seen.add(trial.writer.read(after / PLACE))
            assert content == {path: path.stat().st_mtime_ns for path in after.rglob("*")}, "a reader wrote"
            trial.writer.write(after / PLACE, DISK)
            assert trial.writer.read(after / PLACE) == "2"
            assert not leftovers(after)
        disk.close()
    assert seen <= {before, "1", "2"}
    assert len(seen) > 1


def test_a_write_that_returned_survives_power_loss(trial: Trial) -> None:
    disk = CrashingDisk(trial.copy(), at=10**9)
    trial.writer.write(disk.root / PLACE, disk)
    disk.close()
    assert trial.writer.read(disk.after("everything", trial.scratch / "after") / PLACE) == "2"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("lasting", ["once", "full"])
def test_a_failure_of_any_operation_is_one_sentence_and_loses_nothing(
    trial: Trial, lasting: str, code: int
) -> None:
    before = trial.writer.read(trial.begin / PLACE)
    for at in range(1, trial.operations + 1):
        disk = CrashingDisk(trial.copy(), at=at, error=code, full=lasting == "full")
        with pytest.raises(ConsiliumError, match=f"cannot save to {disk.root}") as caught:
            trial.writer.write(disk.root / PLACE, disk)
        disk.close()
        assert "\n" not in str(caught.value)
        assert trial.writer.read(disk.root / PLACE) in {before, "1", "2"}
        trial.writer.write(disk.root / PLACE, DISK)
        assert trial.writer.read(disk.root / PLACE) == "2"
        assert not leftovers(disk.root)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (errno.ENOSPC, "no space left on the disk"),
        (errno.EDQUOT, "no space left on the disk"),
        (errno.EROFS, "no permission to write"),
        (errno.EIO, "input/output error"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_the_sentence_says_why(
    name: str, code: int, why: str, known: dict[str, Writer], tmp_path: Path
) -> None:
    disk = CrashingDisk(tmp_path, at=3, error=code, full=True)
    with pytest.raises(ConsiliumError, match=why):
        known[name].write(tmp_path / PLACE, disk)
    disk.close()
    assert not leftovers(tmp_path)
