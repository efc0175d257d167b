"""``consilium runs`` and ``consilium report``: readers of records, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from consilium.cli.main import main
from report.run_folders import Kind, MakeRun, make_run  # noqa: F401 - a fixture


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path: Path, make_run: MakeRun) -> Path:  # noqa: F811
    make_run("a", Kind())
    make_run("dense", Kind(layers=0, model="llama:tiny"))
    make_run("unfinished", Kind(ended=False))
    (tmp_path / "deeper/text").mkdir(parents=True)
    make_run("deeper/b", Kind(dead=(1,)))
    return tmp_path


def test_runs_lists_every_run_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(said(capsys, "runs", folder, "--json"))
    names = {Path(one["run"]).name: one for one in told["runs"]}
    assert set(names) == {"a", "b", "dense", "unfinished"}
    assert names["a"]["finished"]
    assert not names["unfinished"]["finished"]
    assert names["a"]["steps"] == 20
    assert names["dense"]["model"] == "llama:tiny"
    lines = said(capsys, "runs", folder).splitlines()
    assert len(lines) == 5
    assert "not finished" in next(line for line in lines if "unfinished" in line)


def test_a_damaged_run_hides_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a/summary.json").write_text("{")
    told = json.loads(said(capsys, "runs", folder, "--json"))
    assert len(told["runs"]) == 3
    assert "summary.json" in told["damaged"][0]
    assert "damaged: " in said(capsys, "runs", folder)


def test_a_folder_without_runs_says_how_to_make_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "consilium train" in said(capsys, "runs", tmp_path)
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_report_writes_every_page_and_compares_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [folder / name for name in ("a", "dense", "unfinished")]
    told = json.loads(said(capsys, "report", *runs, "--json"))
    assert [Path(page) for page in told["pages"]] == [
        *(run / "report.html" for run in runs),
        folder / "comparison.html",
    ]
    page = (folder / "comparison.html").read_text()
    assert "<script" not in page
    assert all(run.name in page for run in runs)
    assert "wrote" in said(capsys, "report", runs[0])


def test_what_is_no_run_is_refused_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(folder / "a"), str(folder / "deeper/text")]) == 2
    shown = capsys.readouterr()
    assert "is no training run" in shown.err
    assert shown.out == ""
    assert not (folder / "a/report.html").exists()


def test_somebody_elses_file_is_never_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, runs = folder / "thesis.html", [str(folder / name) for name in ("a", "dense")]
    theirs.write_text("<!DOCTYPE html> mine")
    assert main(["report", *runs, "--out", str(theirs)]) == 2
    assert "is no page of ours" in capsys.readouterr().err
    assert theirs.read_text() == "<!DOCTYPE html> mine"
    assert not (folder / "a/report.html").exists()
    assert main(["report", runs[0], "--out", str(folder / "one.html")]) == 2
    assert "give another RUN" in capsys.readouterr().err
    for _ in range(2):
        said(capsys, "report", *runs, "--out", folder / "ours.html")


def test_neither_imports_torch(folder: Path) -> None:
    code = (
        "import sys; from consilium.cli.main import main\n"
        "assert main(['runs', sys.argv[1], '--json']) == 0\n"
        "assert main(['report', sys.argv[1] + '/a', '--json']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True)
