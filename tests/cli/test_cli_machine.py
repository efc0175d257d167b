"""``doctor`` and ``bench`` about a machine, a folder and a device."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from checkpoint.gguf_models import qwen3
from checkpoint.models import trained
from consilium.checkpoint import store
from consilium.cli.main import main
from consilium.data.tokenizer import Tokenizer
from consilium.records.bench import BenchRecord
from consilium.records.io import from_json


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "model"
    store.save(trained(qwen3()), folder, tokenizer=Tokenizer.of_bytes())
    return folder


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "model")
    return tmp_path / "model"


def told(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> dict[str, dict[str, str]]:
    assert main([*map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_doctor_tells_what_will_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        used = told(capsys, "doctor", "--device", "cpu", "--threads", "2")["facts"]["used"]
        assert used.startswith("cpu, 2 threads, ")
        assert "bfloat16 in training" in told(capsys, "doctor", "--dtype", "bfloat16")["facts"]["used"]
    finally:
        torch.set_num_threads(before)


def test_a_whole_folder_is_called_that(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "doctor", model)["problems"] == []
    assert main(["doctor", str(model)]) == 0
    assert "whole and unchanged" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_file_is_named(name: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((model / name).read_bytes())
    content[-2] ^= 1
    (model / name).write_bytes(bytes(content))
    (problem,) = told(capsys, "doctor", model, code=1)["problems"]
    assert name in problem


def test_a_folder_without_hashes_is_read_whole(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "manifest.json").unlink()
    assert "every tensor" in told(capsys, "doctor", model)["facts"]["checked"]
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert told(capsys, "doctor", model, code=1)["problems"]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_bench_decodes_with_a_model_of_the_user(
    dtype: str | None, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [] if dtype is None else ["--dtype", dtype]
    assert main(["bench", str(model), "--json", *words]) == 0
    record = from_json(BenchRecord, capsys.readouterr().out, where="bench")
    assert record.name == str(model)
    assert [figure.name.split()[0] for figure in record.figures] == ["prompt", "batch", "batch"]
    assert all(figure.median > 0 for figure in record.figures)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["bench", "train-tiny", "--dtype", "float32"], "runs on the CPU in its own dtype"),
        (["bench", "nothing-here"], "is neither a folder nor one of train-tiny"),
        (["bench", "{model}", "--against", "transformers"], "has no rival to run"),
        (["bench", "{model}", "--device", "cuda"], "device cuda is not here"),
        (["doctor", "--device", "cuda:3"], "device cuda:3 is not here"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    words: list[str],
    answer: str,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([word.format(model=model) for word in words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert answer in shown.err
    assert shown.err.count("\n") == 1
