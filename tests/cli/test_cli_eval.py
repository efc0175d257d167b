"""What ``eval`` refuses, and what it marks as no prediction."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from runs import write_config, write_text

import consilium as cs
from consilium.cli.main import main
from consilium.config.data import Data, TextPath
from consilium.config.model import MTP, Model
from consilium.data.corpus import build_corpus
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError
from small import KINDS, lively


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text")


def model(folder: Path, config: Model = KINDS["deepseek"], **keys: Any) -> str:
    cs.save(lively(dataclasses.replace(config, **keys)), folder, tokenizer=Tokenizer.of_bytes())
    return str(folder)


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err.strip().splitlines()[-1]


def test_text_that_changed_since_the_training_is_refused(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(write_config(tmp_path, text, steps=1)), "--out", str(run)]) == 0
    assert main(["eval", str(run), "--json"]) == 0
    (text / "notes" / "0.txt").write_text("other text")
    capsys.readouterr()
    assert "the text has changed" in complaint(capsys, "eval", str(run))
    assert main(["eval", str(run), "--data", str(text), "--json"]) == 0


def test_a_context_beyond_the_model_is_refused(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model(tmp_path / "model", max_length=64)
    assert "beyond the 64" in complaint(capsys, "eval", folder, "--data", str(text), "--seq", "65")
    assert "would leave out text" in complaint(
        capsys, "eval", folder, "--data", str(text), "--seq", "16", "--stride", "17"
    )


def test_text_is_asked_for_where_nothing_was_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--data builtin" in complaint(capsys, "eval", model(tmp_path / "model"))


def test_a_tokenizer_of_another_model_is_refused(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model(tmp_path / "model", vocab_size=200)
    assert "use the tokenizer of this model" in complaint(capsys, "eval", folder, "--data", str(text))


def test_the_limit_takes_the_same_text_for_every_model(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[dict[str, object]] = []
    for seed, length in ((1, 16), (2, 64)):
        folder = model(tmp_path / f"model{seed}", max_length=length)
        capsys.readouterr()
        assert main(["eval", folder, "--data", str(text), "--limit", "300", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [one["context"] for one in found] == [16, 64]
    assert found[0]["bytes"] == found[1]["bytes"] == 600
    assert found[0]["documents"] == found[1]["documents"]


def test_text_of_several_places_is_measured_whole_and_once(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.txt").write_text("other words")
    folder, other = model(tmp_path / "model"), str(tmp_path / "other.txt")

    def measured(*paths: str) -> int:
        capsys.readouterr()
        assert main(["eval", folder, *(word for path in paths for word in ("--data", path)), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["bytes"]

    assert measured(str(text), other) == measured(str(text)) + len("other words")
    assert "name each text once" in complaint(capsys, "eval", folder, "--data", other, "--data", other)


def test_a_model_that_is_not_causal_is_marked(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = cs.recipe("expert-choice", size="tiny")
    folder = model(tmp_path / "model", config, vocab_size=300)
    capsys.readouterr()
    words = ["eval", folder, "--data", str(text), "--seq", "16", "--limit", "200"]
    assert main(words) == 0
    assert "not comparable" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["causal"] is False


def test_a_corpus_of_which_nothing_can_be_held_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConsiliumError, match="nothing can be held out of 1 characters"):
        build_corpus(Data(sources=(TextPath(path=str(tmp_path)),)), 300)


def test_a_page_shows_two_models_one_below_the_other(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, page = model(tmp_path / "after"), model(tmp_path / "before"), tmp_path / "page.html"
    words = ["eval", one, "--data", str(text), "--limit", "300", "--tokens-page", str(page), "--beside", two]
    for _ in range(2):  # a page of ours is replaced
        assert main([*words, "--json"]) == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out)["bits_per_byte"] > 0
        assert f"wrote {page}" in shown.err
    drawn = page.read_text(encoding="utf-8")
    assert drawn.index(one) < drawn.index(two)
    assert 'title="expert ' in drawn


def test_a_page_that_cannot_be_is_told_before_the_measurement(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilium.evaluation.bits.measure", None)
    folder, dense = model(tmp_path / "model"), model(tmp_path / "dense", moe=None, mtp=MTP())
    theirs, page = tmp_path / "theirs.html", str(tmp_path / "page.html")
    theirs.write_text("<p>mine</p>")
    words = ["eval", folder, "--data", str(text)]
    assert "give --tokens-page" in complaint(capsys, *words, "--beside", dense)
    assert "choose another --tokens-page" in complaint(capsys, *words, "--tokens-page", str(theirs))
    assert "lies inside" in complaint(capsys, *words, "--tokens-page", f"{dense}/page.html")
    assert "no such folder" in complaint(capsys, *words, "--tokens-page", page, "--beside", "nowhere")
    assert "is dense" in complaint(capsys, *words, "--tokens-page", page, "--beside", dense)
    assert "is dense" in complaint(capsys, "eval", dense, *words[2:], "--tokens-page", page)
    assert theirs.read_text() == "<p>mine</p>"
    assert not Path(page).exists()
