"""Which checkpoint is the newest, which are removed, and whose files are never touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from consilium.disk.atomic import (
    commit_file,
    commit_folder,
    latest,
    prune,
    set_aside,
    standing,
    sweep,
    write_file,
)
from consilium.disk.files import DISK
from consilium.disk.manifest import check_complete, verify
from consilium.errors import ConsiliumError


def commit(folder: Path, text: str = "weights") -> Path:
    def write(staged: Path) -> None:
        (staged / "model.safetensors").write_text(text)
        (staged / "training_state").mkdir()
        (staged / "training_state" / "state.json").write_text("{}")

    commit_folder(folder, write)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_the_highest_number_and_not_the_last_name(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        commit(tmp_path / f"step-{step}")
    assert latest(tmp_path) == tmp_path / "step-100"


@pytest.mark.parametrize("folder", ["", "absent"])
def test_there_may_be_none(folder: str, tmp_path: Path) -> None:
    assert latest(tmp_path / folder) is None
    assert sweep(tmp_path / folder) == []


def test_an_incomplete_folder_with_a_higher_number_is_skipped_with_a_notice(tmp_path: Path) -> None:
    whole = commit(tmp_path / "step-5")
    (tmp_path / "step-900").mkdir()
    (tmp_path / "step-900" / "model.safetensors").write_text("half")
    notices: list[str] = []
    assert latest(tmp_path, notice=notices.append) == whole
    assert len(notices) == 1
    assert "step-900/manifest.json is missing" in notices[0]
    assert "step-5 is the newest whole one" in notices[0]


def cut(path: Path) -> None:
    path.write_text(path.read_text()[:-1])


def flip(path: Path) -> None:
    path.write_text("heights")


@pytest.mark.parametrize(
    ("damage", "check", "noticed"),
    [
        (cut, check_complete, True),
        (flip, check_complete, False),
        (Path.unlink, verify, True),
        (flip, verify, True),
    ],
)
def test_a_damaged_newest_is_passed_over_and_stays(
    damage: Callable[[Path], None], check: Callable[[Path], None], noticed: bool, tmp_path: Path
) -> None:
    """Names and sizes are compared to read; every byte is to go on training."""
    whole, damaged = commit(tmp_path / "step-5"), commit(tmp_path / "step-6")
    damage(damaged / "model.safetensors")
    notices: list[str] = []
    assert latest(tmp_path, check=check, notice=notices.append) == (whole if noticed else damaged)
    assert any("step-6/model.safetensors" in notice for notice in notices) == noticed
    assert names(tmp_path) == ["step-5", "step-6"]


def without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [without_manifest, without_weights])
def test_where_all_are_damaged_nothing_starts_anew(damage: Callable[[Path], None], tmp_path: Path) -> None:
    for step in (5, 6):
        damage(commit(tmp_path / f"step-{step}"))
    with pytest.raises(ConsiliumError, match=r"no checkpoint in .* is complete and unchanged: .*step-6/"):
        latest(tmp_path)


def test_a_damaged_step_makes_way_and_stays(tmp_path: Path) -> None:
    commit(tmp_path / "step-5")
    for text in ("first", "second"):
        (commit(tmp_path / "step-6", text) / "manifest.json").write_text("?")
        set_aside(tmp_path / "step-6")
    commit(tmp_path / "step-6", "again")
    assert sweep(tmp_path) == []
    prune(tmp_path, 1)
    assert names(tmp_path) == ["step-6", "step-6.damaged", "step-6.damaged-1"]
    assert (tmp_path / "step-6.damaged" / "model.safetensors").read_text() == "first"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_keeps_the_newest_complete_ones(keep: int, tmp_path: Path) -> None:
    for step in (1, 2, 10, 30):
        commit(tmp_path / f"step-{step}")
    (tmp_path / "step-40").mkdir()
    prune(tmp_path, keep)
    assert names(tmp_path) == sorted(["step-40", *["step-1", "step-2", "step-10", "step-30"][-keep:]])


def test_pruning_never_removes_the_only_whole_one_or_the_one_just_saved(tmp_path: Path) -> None:
    whole = commit(tmp_path / "step-3")
    for step in (7, 8):
        (commit(tmp_path / f"step-{step}") / "model.safetensors").unlink()
    prune(tmp_path, 1)
    assert whole.exists()
    commit(tmp_path / "step-900", "of an older run")
    prune(tmp_path, 1, current=whole)
    assert whole.exists()


def test_sweeping_removes_leftovers_only_and_says_which(tmp_path: Path) -> None:
    commit(tmp_path / "step-3")
    (tmp_path / f"step-4.tmp-{'0' * 16}").mkdir()
    (tmp_path / f"step-4.tmp-{'0' * 16}" / "model.safetensors").write_text("half")
    (tmp_path / "notes.tmp-draft").mkdir()
    assert [path.name for path in sweep(tmp_path)] == [f"step-4.tmp-{'0' * 16}"]
    assert names(tmp_path) == ["notes.tmp-draft", "step-3"]


def test_sweeping_never_follows_a_link(tmp_path: Path) -> None:
    outside = commit(tmp_path / "outside")
    leftover = tmp_path / "runs" / f"step-4.tmp-{'0' * 16}"
    leftover.mkdir(parents=True)
    (leftover / "link").symlink_to(outside, target_is_directory=True)
    sweep(tmp_path / "runs")
    assert names(tmp_path / "runs") == []
    verify(outside)


def test_a_failing_writer_leaves_nothing_and_its_error_passes(tmp_path: Path) -> None:
    def write(staged: Path) -> None:
        (staged / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit_folder(tmp_path / "step-1", write)
    assert names(tmp_path) == []


def test_missing_parents_are_made_and_an_empty_folder_is_filled(tmp_path: Path) -> None:
    verify(commit(tmp_path / "a" / "b" / "model"))
    (tmp_path / "empty").mkdir()
    verify(commit(tmp_path / "empty"))


def foreign_step(folder: Path) -> None:
    (folder / "optimizer.pt").write_text("of another program")


def foreign_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": "theirs", "files": []}')


def forged_manifest(folder: Path) -> None:
    """As ours, but the files are not what it says."""
    commit(folder.with_name("other"), "other")
    shutil.copytree(folder.with_name("other"), folder, dirs_exist_ok=True)
    shutil.rmtree(folder.with_name("other"))
    (folder / "model.safetensors").write_text("irreplaceable")


def only_a_link(folder: Path) -> None:
    (folder / "data").symlink_to(Path.cwd(), target_is_directory=True)


def only_folders(folder: Path) -> None:
    (folder / "layout" / "empty").mkdir(parents=True)


def edited(folder: Path) -> None:
    folder.rmdir()
    (commit(folder) / "training_state" / "state.json").write_text("[]")


@pytest.mark.parametrize("name", ["step-1000", "model"])
@pytest.mark.parametrize(
    "content", [foreign_step, foreign_manifest, forged_manifest, only_a_link, only_folders, edited]
)
def test_a_folder_that_holds_anything_but_an_unchanged_save_is_never_replaced(
    content: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    content(folder)
    before = {path: path.lstat().st_ino for path in tmp_path.rglob("*")}
    with pytest.raises(
        ConsiliumError, match=f"cannot save to {folder}: it .*; give a new or empty folder"
    ) as caught:
        commit(folder, "mine")
    assert "\n" not in str(caught.value)
    assert {path: path.lstat().st_ino for path in tmp_path.rglob("*")} == before


def test_a_checkpoint_of_a_run_is_replaced_by_its_saver_only(tmp_path: Path) -> None:
    folder = commit(tmp_path / "step-1")
    with pytest.raises(ConsiliumError, match="a checkpoint that training can go on from"):
        commit_folder(folder, lambda staged: None, unless=("training_state/state.json",))
    assert (commit(folder, "again") / "model.safetensors").read_text() == "again"


def test_a_reader_finds_what_a_crash_left_moved_aside_and_moves_nothing(tmp_path: Path) -> None:
    aside = commit(tmp_path / "step-3").rename(tmp_path / f".step-3.old-{'0' * 16}")
    assert standing(tmp_path / "step-3") == aside == latest(tmp_path)
    assert standing(tmp_path / "absent" / "step-3") == tmp_path / "absent" / "step-3"
    assert names(tmp_path) == [aside.name]
    assert sweep(tmp_path) == [aside]
    assert standing(tmp_path / "step-3") == tmp_path / "step-3" == latest(tmp_path)


@pytest.mark.parametrize("also_ours", ["", "ours"])
def test_a_folder_with_files_of_the_user_is_never_replaced(also_ours: str, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    if also_ours:
        commit(folder)
    folder.mkdir(exist_ok=True)
    (folder / "chapter.tex").write_text("irreplaceable")
    with pytest.raises(ConsiliumError, match=r"holds files that no save wrote \(chapter\.tex\)"):
        commit(folder, "other")
    assert (folder / "chapter.tex").read_text() == "irreplaceable"
    assert names(tmp_path) == ["thesis"]


def test_a_folder_of_somebody_else_is_not_walked_through(tmp_path: Path) -> None:
    """The destination may be a whole disk by a slip."""
    deep = tmp_path / "theirs" / "deep"
    for name in "abcdef":
        (deep / name).mkdir(parents=True)
    with mock.patch("os.scandir", wraps=os.scandir) as read:
        with pytest.raises(ConsiliumError, match=r"no save wrote \(deep\)"):
            commit(tmp_path / "theirs")
        assert read.call_count < 4
    assert names(deep) == list("abcdef")


def test_a_file_in_the_way_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("irreplaceable")
    with pytest.raises(ConsiliumError, match="it is a file; give the name of a new folder"):
        commit(tmp_path / "model")


def test_a_file_takes_the_place_of_a_file_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    for content in (b"old", b"new"):
        write_file(path, content)
        assert path.read_bytes() == content
    path.with_name("link").symlink_to(path)
    write_file(path.with_name("link"), b"through the link")
    assert path.read_bytes() == b"through the link"
    os.mkfifo(tmp_path / "pipe")
    for name in ("deep", "pipe"):
        with pytest.raises(
            ConsiliumError, match="there is something that is no file; remove it or give another"
        ):
            write_file(tmp_path / name, b"")
    with pytest.raises(ConsiliumError, match="there is a file already"):
        commit_file(path, lambda staged: DISK.write(staged, [b"other"]), new=True)
    assert names(tmp_path / "deep") == ["a.txt", "link"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def write(staged: Path) -> None:
        DISK.write(staged, [b"mine"])
        (tmp_path / "a").write_text("of another process")

    with pytest.raises(ConsiliumError, match="there is a file already"):
        commit_file(tmp_path / "a", write, new=True)
    assert (tmp_path / "a").read_text() == "of another process"
    assert names(tmp_path) == ["a"]


def test_an_append_is_whole_or_nothing(tmp_path: Path) -> None:
    """A quota cuts a write short without an error; a limit of this process does the same."""
    path = tmp_path / "a"
    path.write_bytes(b"1" * 90)
    code = f"""
import resource, signal
from pathlib import Path
from consilium.disk.files import DISK
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    DISK.append(Path({str(path)!r}), b"2" * 20)
except OSError as error:
    print(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{errno.ENOSPC}\n"
    assert path.read_bytes() == b"1" * 90


def test_macos_is_asked_for_more_than_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    fake = SimpleNamespace(F_FULLFSYNC=51, fcntl=lambda descriptor, request: asked.append(request))
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("consilium.disk.files.fcntl", fake, raising=False)
    write_file(tmp_path / "a", b"text")
    assert asked == [51, 51]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConsiliumError, match="no permission to write there; choose another folder"):
        commit(tmp_path / "model")


def test_a_read_only_place_is_one_sentence() -> None:
    with pytest.raises(ConsiliumError, match=r"cannot save to /proc/consilium: .*; choose another folder"):
        commit(Path("/proc/consilium"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("files"), "is not of format 1"),
        (lambda data: data.update(format=2), "is not of format 1"),
        (
            lambda data: data["files"].update({"../secret": {"bytes": 1, "sha256": ""}}),
            "not a plain name inside",
        ),
        (
            lambda data: data["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}),
            "not a plain name inside",
        ),
        (lambda data: data["files"].update(more={"bytes": "1", "sha256": ""}), "without a size and a digest"),
        (lambda data: data["files"].update(more={"bytes": 1}), "is not a readable manifest"),
        (lambda data: data["files"].update(more={"bytes": 1, "sha256": ""}), "more is missing"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(change: object, message: str, tmp_path: Path) -> None:
    folder = commit(tmp_path / "model")
    data = json.loads((folder / "manifest.json").read_text())
    assert callable(change)
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(ConsiliumError, match=message):
        verify(folder)


def test_an_unlisted_file_that_a_loader_would_open_is_refused(tmp_path: Path) -> None:
    folder = commit(tmp_path / "model")
    (folder / "README.md").write_text("harmless")
    verify(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConsiliumError, match=r"index\.json was not there when this folder was saved"):
        verify(folder)


def test_nothing_is_written_into_a_folder_that_was_committed(tmp_path: Path) -> None:
    saved = commit(tmp_path / "saved")
    for place in (saved / "inner", saved / "training_state" / "a" / "b"):
        with pytest.raises(ConsiliumError, match="lies inside"):
            commit(place)
        with pytest.raises(ConsiliumError, match="lies inside"):
            write_file(place, b"text")
    verify(saved)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "manifest.json").write_text('{"name": "a page of the web"}')
    verify(commit(tmp_path / "theirs" / "inner"))
