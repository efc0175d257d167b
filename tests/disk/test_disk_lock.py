"""One process at a time, by the one rule there is."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from consilium.disk.atomic import commit_folder, sweep
from consilium.disk.lock import held
from consilium.errors import ConsiliumError

HOLD = """
import sys
from pathlib import Path
from consilium.disk.lock import held
with held(Path(sys.argv[1]), busy="busy"):
    print("held", flush=True)
    sys.stdin.read()
"""


FILL = """
import sys
from pathlib import Path
from consilium.disk.atomic import commit_folder
def write(staged):
    (staged / "weights").write_text("theirs")
    print("writing", flush=True)
    sys.stdin.read()
commit_folder(Path(sys.argv[1]), write)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows locks no folders")
@pytest.mark.parametrize("killed", [False, True])
def test_a_second_writer_of_a_folder_is_refused_and_a_killed_one_makes_way(
    killed: bool, tmp_path: Path
) -> None:
    def write(staged: Path) -> None:
        (staged / "weights").write_text("ours")

    with subprocess.Popen(
        [sys.executable, "-c", FILL, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "writing\n"
        with pytest.raises(ConsiliumError, match="another process is writing it now"):
            commit_folder(tmp_path / "out", write)
        assert sweep(tmp_path) == []  # nor is it taken for what a crash left
        if killed:
            other.kill()
        else:
            other.communicate()
        other.wait()
    assert (tmp_path / "out").exists() is not killed
    commit_folder(tmp_path / "out", write)
    assert (tmp_path / "out" / "weights").read_text() == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_process_waits_or_is_told_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for wait in (0.0, 0.2):
            with (
                pytest.raises(ConsiliumError, match="another one is at it"),
                held(file, busy="another one is at it", wait=wait),
            ):
                pytest.fail("two hold it")
        other.kill()
        other.wait()
    with held(file, busy="busy") as alone, held(file, busy="busy"):
        assert alone
    with held(file, busy="busy"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    told: list[str] = []
    with held(tmp_path / "lock", busy="busy", notice=told.append) as alone:
        assert not alone
    assert "has no locks: let no other process write there" in told[0]


def test_a_place_where_no_file_can_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConsiliumError, match="cannot save to"), held(tmp_path / "file" / "lock", busy="busy"):
        pytest.fail("held")
    with pytest.raises(ConsiliumError, match="cannot save to"), held(Path("/proc/lock"), busy="busy"):
        pytest.fail("held")
