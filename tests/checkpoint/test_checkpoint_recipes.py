"""Every system, balanced in every way that leaves other state, survives a folder bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from consilium.checkpoint import store
from consilium.config.model import Model
from consilium.config.router import Hash
from consilium.errors import ConsiliumError
from consilium.model.build import build
from consilium.model.decoder import Decoder
from consilium.recipes.catalogue import find, names, recipe
from consilium.recipes.variants import with_balance

ROUTED = [name for name in names() if find(name).model("tiny").moe is not None]
VOCABULARY = 64
STATES = ("none", "bias", "smebu", "adaptive", "load", "sinkhorn")
"""One balance of each kind of state: nothing, a bias, more beside it, a coefficient, noise, a selector."""
PAIRS = [(name, balance) for name in ROUTED for balance in STATES]
IMPOSSIBLE = {
    *(("hash", balance) for balance in STATES if balance != "none"),
    *(("expert-choice", balance) for balance in STATES if balance != "none"),
    *((name, "load") for name in ("gshard", "switch", "deepseek-v2", "skywork-moe")),
    *((name, "sinkhorn") for name in ("gshard", "deepseek-v2")),
}


def small(name: str) -> Model:
    """The tiny size with two kinds of blocks at most and few words: its layout is what matters here."""
    config = recipe(name, "tiny")
    assert config.moe is not None
    moe = config.moe
    if isinstance(moe.router.select, Hash):
        select = dataclasses.replace(moe.router.select, vocab_size=VOCABULARY)
        moe = dataclasses.replace(moe, router=dataclasses.replace(moe.router, select=select))
    return dataclasses.replace(config, vocab_size=VOCABULARY, layers=2, moe=moe)


def assert_same(folder: Path, model: Decoder) -> None:
    store.save(model, folder)
    loaded = store.load(folder)
    assert loaded.config == model.config
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def moved(config: Model) -> Decoder:
    """A model whose balance state is no longer what a new one has."""
    model = build(config, seed=1)
    for layer in model.moe_modules().values():
        for buffer in layer.balance.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.25)
    return model


@pytest.mark.parametrize("name", ROUTED)
def test_a_system_survives_a_folder(name: str, tmp_path: Path) -> None:
    assert_same(tmp_path / "model", moved(small(name)))


@pytest.mark.parametrize(("name", "balance"), [pair for pair in PAIRS if pair not in IMPOSSIBLE])
def test_a_system_survives_a_folder_with_any_balance(name: str, balance: str, tmp_path: Path) -> None:
    assert_same(tmp_path / "model", moved(with_balance(small(name), balance)))


@pytest.mark.parametrize(("name", "balance"), sorted(IMPOSSIBLE))
def test_a_balance_that_would_move_nothing_is_refused(name: str, balance: str) -> None:
    with pytest.raises(ConsiliumError, match=f"^--balance {balance}: "):
        with_balance(small(name), balance)
