"""``--json`` on every verb that has figures: one object on standard output, and nothing else there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import write_config, write_text

from consilium.cli.main import VERBS, main, verb_parser
from consilium.config import io
from consilium.config.training import Training
from consilium.records.io import from_json, read_json
from consilium.records.run import SUMMARY_FILE, Summary
from upcycling.sources import LLAMA, saved
from upcycling.sources import text as lines

WITHOUT = {"chat", "serve"}
"""A conversation has no end to sum up: ``generate --chat --json`` is one turn of it with its figures."""
WORDS = {
    "demo": ["--minutes", "0.005", "--out", "{new}"],
    "systems": ["deepseek-v3"],
    "plan": ["deepseek-v3:tiny"],
    "train": ["{config}", "--out", "{new}"],
    "eval": ["{run}", "--limit", "200"],
    "generate": ["{run}", "--prompt", "a", "--max-tokens", "2"],
    "convert": ["{run}", "{new}"],
    "upcycle": ["{dense}", "{new}", "--method", "copy", "--experts=2", "--top-k=1", "--data", "{text}"],
    "runs": ["{run}/.."],
    "report": ["{run}"],
    "bench": ["{run}"],
    "doctor": ["{run}"],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    return write_config(folder, write_text(folder / "text"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", str(config), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    saved(LLAMA, folder / "model")
    lines(folder / "a.txt")
    return folder / "model"


def test_every_verb_with_figures_is_walked() -> None:
    assert set(WORDS) | WITHOUT == set(VERBS)


@pytest.mark.parametrize("verb", WORDS)
def test_one_object_and_nothing_else(
    verb: str,
    config: Path,
    run: Path,
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = io.read_yaml(Training, config)
    monkeypatch.setattr("consilium.cli.configure.demo_config", lambda: small)
    places = {"run": run, "config": config, "dense": dense, "text": dense.parent / "a.txt"}
    words = [word.format(**places, new=tmp_path / "new") for word in WORDS[verb]]
    capsys.readouterr()
    assert main([verb, *words, "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


@pytest.mark.parametrize("verb", WORDS)
def test_an_error_leaves_standard_output_empty(
    verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wrong = {
        "demo": ["--out", str(_foreign(tmp_path))],
        "systems": ["nothere"],
        "train": ["nothere:tiny", "--out", str(tmp_path / "new")],
        "convert": ["./nothere", str(tmp_path / "new")],
        "generate": ["./nothere", "--prompt", "a"],
    }.get(verb, ["./nothere"])
    assert main([verb, *wrong, "--json"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")


def _foreign(folder: Path) -> Path:
    """A run that is not the demo's, by its configuration alone."""
    path = folder / "other"
    path.mkdir()
    write_config(path, folder).rename(path / "config.yaml")
    return path


def test_a_run_is_shown_beside_its_summary(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a person sees of it goes to standard error, the figures of ``summary.json`` to the program."""
    out = tmp_path / "run"
    assert main(["train", str(config), "--out", str(out), "--resume", "--json"]) == 0
    shown = capsys.readouterr()
    assert from_json(Summary, shown.out, where="train") == read_json(Summary, out / SUMMARY_FILE)
    assert "holds no run yet" in shown.err
    assert "held-out bits per byte" in shown.err
    assert "next" in shown.err


def test_the_flag_is_where_it_is_said_to_be() -> None:
    flagged = {
        name
        for name in VERBS
        if any("--json" in action.option_strings for action in verb_parser(name).actions())
    }
    assert flagged == set(WORDS)
