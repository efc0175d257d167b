"""Models of transformers and ours are the same function: logits, greedy text, loss, and every gradient.

Folders are those that transformers writes: a tensor an expert, in many shards, and all experts of a layer in
one tensor.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from consilium.checkpoint import safetensors_io, store
from consilium.checkpoint.hf.architecture import architecture
from consilium.checkpoint.hf.naming import TABLES, named
from consilium.engine.engine import Engine
from consilium.model.decoder import Decoder
from parity.theirs import CASES, GRID, build, opened, some_ids
from support import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
LENGTH = 512
LOGITS = 1e-5
GRADIENTS = 1e-4
NAMES = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in GRID)]
LAYOUTS: dict[str, dict[str, Any]] = {
    "sharded": {"max_shard_size": "20KB"},
    "fused": {"save_original_format": False},
}


def worst(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value: no mean hides a wrong position."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def answers(model: Any, ids_BS: Tensor) -> Tensor:
    return model(ids_BS).logits


def ours_of(theirs: Any, folder: Path, **layout: Any) -> Decoder:
    theirs.save_pretrained(folder, **layout)
    return store.load(folder).eval()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_we_open_their_folder_with_the_same_logits(name: str, layout: str, tmp_path: Path) -> None:
    theirs = build(name)
    ours = ours_of(theirs, tmp_path, **LAYOUTS[layout])
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (layout == "sharded")
    ids_BS = some_ids(1, LENGTH)
    assert worst(answers(ours, ids_BS), answers(theirs, ids_BS)) < LOGITS


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_identical(name: str, tmp_path: Path) -> None:
    theirs = build(name)
    ours = ours_of(theirs, tmp_path)
    prompt_BS = some_ids(1, 9)
    expected = theirs.generate(
        prompt_BS,
        attention_mask=torch.ones_like(prompt_BS),
        do_sample=False,
        max_new_tokens=64,
    )
    assert Engine(ours).complete(prompt_BS.tolist(), max_tokens=64) == expected[:, 9:].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_every_gradient_are_identical(name: str, tmp_path: Path) -> None:
    theirs = build(name)
    ours = ours_of(theirs, tmp_path)
    ids_BS = some_ids(2, 48)
    expected = theirs(ids_BS, labels=ids_BS).loss
    expected.backward()
    actual = F.cross_entropy(ours(ids_BS).logits[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())
    actual.backward()
    assert relative_error(actual, expected) < LOGITS
    wanted = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    found = gradients(ours)
    assert found.keys() == wanted.keys()
    errors = {key: relative_error(found[key], wanted[key]) for key in wanted}
    assert max(errors.values()) < GRADIENTS, errors


def gradients(model: Decoder) -> dict[str, Tensor]:
    """By the names of transformers' parameters, which are those of the layout with fused experts."""
    kind = architecture(model.config)
    assert kind is not None
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    known = {name: grad for name, grad in grads.items() if grad is not None}
    assert known.keys() == grads.keys()
    return dict(named(model.config, known, TABLES[kind][-1]))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", NAMES)
def test_they_open_our_folder_and_complain_of_nothing(
    name: str, *, sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = build(name)
    ours = ours_of(theirs, tmp_path / "theirs")
    if sharded:
        small = functools.partial(safetensors_io.write_sharded, shard_bytes=20_000)
        monkeypatch.setattr(safetensors_io, "write_sharded", small)
    store.save(ours, tmp_path / "ours")
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 3) == sharded
    again = opened(tmp_path / "ours")
    assert type(again.model) is type(theirs)
    assert not any(again.report.values()), again.report
    assert not again.warnings
    ids_BS = some_ids(1, LENGTH)
    assert worst(answers(again.model, ids_BS), answers(ours, ids_BS)) < LOGITS


@pytest.mark.parametrize("name", NAMES)
def test_our_file_holds_their_tensors_bit_by_bit(name: str, tmp_path: Path) -> None:
    theirs = build(name)
    theirs.save_pretrained(tmp_path / "theirs")
    store.save(store.load(tmp_path / "theirs"), tmp_path / "ours")
    expected = safetensors_io.read(tmp_path / "theirs" / "model.safetensors")
    actual = safetensors_io.read(tmp_path / "ours" / "model.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
    assert {key: value.dtype for key, value in actual.items()} == {k: v.dtype for k, v in expected.items()}
