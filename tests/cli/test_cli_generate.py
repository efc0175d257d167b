"""``consilium generate``: guessed tokens, and routing that is recorded, replayed and changed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from consilium.checkpoint import safetensors_io, store
from consilium.cli.main import main
from consilium.config.model import MTP
from consilium.data.tokenizer import Tokenizer
from consilium.engine.routes import Recording
from small import DEEPSEEK, DENSE, lively

ASKED = ("--prompt", "abcabcabcabc", "--max-tokens", "12")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "model"
    config = dataclasses.replace(DEEPSEEK, mtp=MTP(depth=1))
    store.save(lively(config), folder, tokenizer=Tokenizer.of_bytes())
    return folder


def generated(capsys: pytest.CaptureFixture[str], model: Path, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["generate", str(model), *ASKED, "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], model: Path, *words: str) -> str:
    capsys.readouterr()
    assert main(["generate", str(model), *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize("words", [("ngram",), ("mtp",), ("mtp", "--draft", "3"), ("ngram", "--draft", "1")])
def test_guesses_change_no_text(
    model: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = generated(capsys, model)
    found = generated(capsys, model, "--speculate", *words)
    assert found["completions"][0]["tokens"] == plain["completions"][0]["tokens"]
    assert plain["speed"]["guessed"] == 0
    assert 0 <= found["speed"]["guessed_right"] <= found["speed"]["guessed"]


def test_the_same_prompt_again_is_another_sample(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--prompt", ASKED[1], "--temperature", "1", "--seed", "3")
    first, second = generated(capsys, model, *words)["completions"]
    assert first["tokens"] != second["tokens"]


def test_how_many_guesses_were_right_is_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(model), *ASKED, "--speculate", "mtp"]) == 0
    assert "guesses right (" in capsys.readouterr().err
    assert main(["generate", str(model), *ASKED]) == 0
    assert "guesses" not in capsys.readouterr().err


def test_routing_is_recorded_and_replayed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = generated(capsys, model, "--record-routing", str(tmp_path / "one"))
    recorded = Recording.read(tmp_path / "one")
    given = len(recorded.tokens) - 11
    assert list(recorded.tokens[given:]) == plain["completions"][0]["tokens"][:-1]
    assert recorded.routes.layers == (1, 2)
    assert recorded.routes.experts_TMK.shape == (given + 11, 2, 2)
    words = ("--replay-routing", str(tmp_path / "one"), "--record-routing", str(tmp_path / "two"))
    again = generated(capsys, model, *words)
    assert again["completions"][0]["tokens"] == plain["completions"][0]["tokens"]
    assert torch.equal(Recording.read(tmp_path / "two").routes.experts_TMK, recorded.routes.experts_TMK)


def test_experts_are_muted_and_fewer_are_used(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = generated(capsys, model)
    busiest = max(range(8), key=lambda expert: plain["loads"]["2"][expert])
    found = generated(capsys, model, "--mute", f"2:{busiest}")
    assert found["loads"]["2"][busiest] == 0
    file = tmp_path / "routing"
    generated(capsys, model, "--experts-per-token", "1", "--record-routing", str(file))
    assert bool(((Recording.read(file).routes.weights_TMK != 0).sum(-1) == 1).all())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*ASKED, "--draft", "3"), "add --speculate ngram or mtp"),
        ((*ASKED, "--speculate", "ngram", "--draft", "0"), "use 1 to 16"),
        ((*ASKED, "--mute", "2"), "names no expert; write its layer and its number"),
        ((*ASKED, "--mute", "0:1"), "the MoE layers are 1 to 2"),
        ((*ASKED, "--experts-per-token", "9"), "use 1 to 2"),
        ((*ASKED, "--prompt", "b", "--record-routing", "r"), "of one prompt; give one"),
        ((*ASKED, "--replay-routing", "absent"), "absent"),
        ((*ASKED, "--record-routing", "/dev/full"), "there is something that is no file"),
    ],
)
def test_mistakes_are_one_sentence(
    model: Path,
    words: tuple[str, ...],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, model, *words)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_recording_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "routing"
    generated(capsys, model, "--record-routing", str(file))
    other = (*ASKED[2:], "--prompt", "abd", "--replay-routing", str(file))
    assert "was recorded of another prompt" in refused(capsys, model, *other)
    values = safetensors_io.read(file)
    for changes, said in (
        ({"tokens": values["tokens"].long()}, "no recorded routing"),
        ({"tokens": values["tokens"][1:]}, "do not fit each other"),
        ({"weights": values["weights"][1:]}, "do not fit each other"),
        ({"margins": values["margins"][1:]}, "do not fit each other"),
        ({"layers": values["layers"] + 1}, "the model has experts in [1, 2]"),
        ({"experts": values["experts"] + 8}, "and the model has 8"),
    ):
        file.unlink()
        safetensors_io.write(file, values | changes)
        assert said in refused(capsys, model, *ASKED, "--replay-routing", str(file))
    file.write_bytes(b"\x80\x04")
    assert str(file) in refused(capsys, model, *ASKED, "--replay-routing", str(file))


def test_a_dense_model_has_no_routing_and_no_modules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.save(lively(DENSE), tmp_path / "dense", tokenizer=Tokenizer.of_bytes())
    said = refused(capsys, tmp_path / "dense", *ASKED, "--speculate", "mtp")
    assert "no multi-token prediction modules" in said
    assert main(["generate", str(tmp_path / "dense"), *ASKED, "--record-routing", str(tmp_path / "r")]) == 2
    assert "without experts has no routing" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
