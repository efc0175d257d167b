"""Which checkpoint is the newest, which are removed, and whose files are never touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from consilium.disk.atomic import commit_folder, latest, prune, sweep, verify
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
    assert "step-900 is incomplete" in notices[0]


def test_a_damaged_newest_is_an_error_unless_asked_to_fall_back(tmp_path: Path) -> None:
    whole, damaged = commit(tmp_path / "step-5"), commit(tmp_path / "step-6")
    (damaged / "model.safetensors").write_text("heights")
    with pytest.raises(ConsiliumError, match=r"step-6/model\.safetensors was changed"):
        latest(tmp_path)
    notices: list[str] = []
    assert latest(tmp_path, fall_back=True, notice=notices.append) == whole
    assert "step-6/model.safetensors was changed" in notices[0]


def test_after_falling_back_the_damaged_step_can_be_saved_again(tmp_path: Path) -> None:
    commit(tmp_path / "step-5")
    (commit(tmp_path / "step-6") / "manifest.json").write_text("?")
    commit(tmp_path / "step-6", "again")
    found = latest(tmp_path)
    assert found is not None
    assert (found / "model.safetensors").read_text() == "again"


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


def test_a_file_in_the_way_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("irreplaceable")
    with pytest.raises(ConsiliumError, match="it is a file; give the name of a new folder"):
        commit(tmp_path / "model")


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
