"""bench/real_upcycling.py on a model of two small layers: what is measured, and on how many tokens."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from consilium.checkpoint import store
from consilium.config.data import Data, TextPath
from consilium.config.training import Bytes
from consilium.data.corpus import build_corpus
from consilium.errors import ConsiliumError
from house.scripts import loaded
from upcycling.sources import LLAMA, saved, text

STEPS = 5
A_STEP = 2 * 32
"""Tokens."""


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with loaded("bench/real_upcycling.py") as module:
        yield module


@pytest.fixture
def texts(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two small sources; the model is small, warms up for three steps and is measured after every second."""
    files = {name: tmp_path / "text" / f"{name}.txt" for name in "ab"}
    (tmp_path / "text").mkdir()
    for file in files.values():
        text(file)
    saved(LLAMA, tmp_path / "dense")
    small = {"LENGTH": 32, "BATCH": 2, "WARM_UP": 3, "EVERY": 2, "HELD_OUT": 64, "DTYPE": "float32"}
    for name, value in small.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "pretrained", lambda: tmp_path / "dense")
    monkeypatch.setattr(bench, "answers", lambda model: {"Who?": Path(model).name})
    data = Data(sources=(TextPath(path=str(tmp_path / "text")),), sequence_length=32, held_out=0.5)
    return bench.Text(build_corpus(data, 300, start=Bytes()), data, files["a"])


def run(bench: ModuleType, name: str, texts: Any, folder: Path) -> tuple[Mapping[str, float], Any]:
    folder.mkdir()
    told = bench.Told()
    found = list(bench.Run(name, folder, texts, 0, told).figures(STEPS))
    assert len({figure.name for figure in found}) == len(found), "no figure is there twice"
    return {figure.name: figure.median for figure in found}, told


def tokens(found: Mapping[str, float]) -> list[int]:
    return [int(name.split()[4]) for name in found if name.endswith(" tokens")]


def test_a_sparse_model_and_its_dense_twin_read_as_much(
    bench: ModuleType, texts: Any, tmp_path: Path
) -> None:
    sparse, told = run(bench, "virtual-group-normalised-half", texts, tmp_path / "sparse")
    dense, plain = run(bench, "dense", texts, tmp_path / "run")
    assert tokens(sparse) == [step * A_STEP for step in (0, 3, 5, 7, 8)]
    assert tokens(dense) == [step * A_STEP for step in (0, 5, 7, 8)]
    assert sparse["bits per byte at step 0"] == pytest.approx(dense["bits per byte at step 0"], rel=1e-4)
    for when in ("at step 0", "after gates warmed up", "after training"):
        for figure in ("bits per byte", "busiest expert", "router entropy", "expert similarity"):
            assert f"{figure} {when}" in sparse
    assert dense["bits per byte after training"] < dense["bits per byte at step 0"]
    assert not any(name.startswith(("busiest", "expert", "router")) for name in dense)
    assert sparse["bits per byte after training"] == sparse[f"bits per byte at {8 * A_STEP} tokens"]
    assert told.answers == {
        "at step 0": {"Who?": "sparse"},
        "after gates warmed up": {"Who?": "warm"},
        "after training": {"Who?": "trained"},
    }
    assert list(plain.answers) == ["at step 0", "after training"]
    assert (told.layout, plain.layout) == ("mixtral", "llama")
    assert told.gguf.startswith("written, ")
    if told.transformers == "opened":
        assert sparse["largest error of logits in transformers"] < 1e-4


def test_gates_warm_up_alone(bench: ModuleType, texts: Any, tmp_path: Path) -> None:
    options = {**bench.METHODS["split-random-half"], "data": texts.calibration}
    bench.upcycle(tmp_path / "dense", tmp_path / "moe", **options)
    model, before = store.load(tmp_path / "moe"), store.load(tmp_path / "moe").state_dict()
    for frozen, moved in ((bench.GATES, {"moe.router."}), ((), {"embed.", "moe.router.", "experts."})):
        config = bench.training_of(model, texts.data, 2, 0, frozen)
        assert list(bench.trained(model, texts, config)) == [1, 2]
        changed = {
            name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
        }
        assert all(any(part in name for name in changed) for part in moved)
        if frozen:
            assert all("moe.router." in name for name in changed)


def test_what_others_cannot_open_is_told(
    bench: ModuleType, texts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {**bench.METHODS["virtual-group-half"], "data": texts.calibration}
    bench.upcycle(tmp_path / "dense", tmp_path / "raw", **made)
    told = bench.Told()
    assert not list(bench.opened(tmp_path / "raw", texts.corpus, told))
    assert (told.layout, told.transformers) == ("deepseek", "no such architecture")

    def refuse(folder: Path, file: Path, dtype: str) -> None:
        raise ConsiliumError(f"{folder} is of no architecture.")

    monkeypatch.setattr(bench, "export", refuse)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert not list(bench.opened(tmp_path / "dense", texts.corpus, told))
    assert told.gguf == "the model is of no architecture."
    assert told.transformers == "not installed here"
    bench.write_told(told, tmp_path / "records" / "answers" / "x.json")
    written = json.loads((tmp_path / "records" / "answers" / "x.json").read_text())
    assert written == {
        "answers": {},
        "layout": "llama",
        "transformers": told.transformers,
        "gguf": told.gguf,
    }


def test_all_questions_are_asked_at_once(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def told(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        prompts = [word for before, word in itertools.pairwise(command) if before == "--prompt"]
        said = {"completions": [{"text": f"of {prompt}"} for prompt in prompts]}
        return subprocess.CompletedProcess(command, 0, json.dumps(said), "")

    monkeypatch.setattr(bench.subprocess, "run", told)
    assert bench.answers(tmp_path) == {question: f"of {question}" for question in bench.QUESTIONS}
