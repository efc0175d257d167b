"""Small early systems and the references they must equal; the machinery is that of ``reference_cases``.

Coefficients are larger than published and groups smaller, so that every mechanism shows in the result. What a
router draws in training is drawn again here, from the same generator in the same order, for the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consilium.config.attention import GQA
from consilium.config.balance import Balance, ImportanceLoss, LoadLoss, SwitchLoss
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.config.moe import Capacity
from consilium.config.router import ExpertChoice, Hash, Select, TopK, TwoLevel
from consilium.model.decoder import Decoder
from consilium.recipes.catalogue import recipe
from model.reference_cases import (
    LAYOUTS,
    VOCABULARY,
    Outcome,
    Reference,
    Rows,
    built,
    documents_of,
    drawn,
    lively_model,
    referred,
    rows_of,
    small_experts,
    small_router,
    small_system,
    training_with_noise,
)
from reference import dense_moe, expert_choice, gshard, jacobs, shazeer
from reference import hash as hash_layers


def _system(name: str, select: Select, *, layers: int = 2, **experts: Any) -> Model:
    """Blocks as the recipe has them, with small heads and experts and ``select`` in the router."""
    config = recipe(name, "tiny")
    moe = small_experts(config, router=small_router(config, select=select), **experts)
    dense = None if config.dense is None else FeedForward(width=14, activation=config.dense.activation)
    attention = GQA(heads=4, kv_heads=4, head_dim=6)
    return small_system(name, layers=layers, attention=attention, dense=dense, moe=moe)


def _shazeer(select: TopK | TwoLevel) -> Model:
    losses = ImportanceLoss(coefficient=0.3), LoadLoss(coefficient=0.7)
    return _system("shazeer", select, layers=4, balance=Balance(losses=losses))


def gshard_config(factor: float, group_tokens: int | None) -> Model:
    config = recipe("gshard", "tiny")
    assert config.moe is not None
    balance = Balance(losses=(SwitchLoss(coefficient=0.5, counts="first"),))
    admission = Capacity(factor=factor, group_tokens=group_tokens)
    return _system("gshard", config.moe.router.select, layers=4, admission=admission, balance=balance)


def _expert_choice(factor: float) -> Model:
    return _system("expert-choice", ExpertChoice(factor=factor), layers=4)


SYSTEMS: dict[str, Model] = {
    "dense-moe": _system("dense-moe", TopK(k=8)),
    "jacobs": _system("jacobs", TopK(k=8)),
    "shazeer": _shazeer(TopK(k=3)),
    "shazeer-all": _shazeer(TopK(k=8)),
    "shazeer-hierarchical": _shazeer(TwoLevel(groups=4, keep=2, k=1)),
    "shazeer-hierarchical-wide": _shazeer(TwoLevel(groups=2, keep=1, k=3)),
    "gshard": gshard_config(1.0, group_tokens=6),
    "gshard-full": gshard_config(0.6, group_tokens=None),
    "hash": _system("hash", Hash(vocab_size=VOCABULARY)),
    "hash-two": _system("hash", Hash(k=2, vocab_size=VOCABULARY, seed=3)),
    "expert-choice": _expert_choice(2.0),
    "expert-choice-few": _expert_choice(0.7),
}
VARIANTS = ("shazeer-all", "shazeer-hierarchical-wide", "gshard-full", "hash-two", "expert-choice-few")
"""The same mechanisms with other numbers: one layout is enough for them."""


REFERENCES: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {
    "dense-moe": dense_moe.model,
    "jacobs": jacobs.model,
    "shazeer": shazeer.model,
    "gshard": gshard.model,
    "hash": hash_layers.model,
    "expert-choice": expert_choice.model,
}
"""By family. Shazeer's and GShard's want what the routers draw, that of hash layers their tables."""


def model_of(system: str, dtype: torch.dtype = torch.float64) -> Decoder:
    return lively_model(SYSTEMS[system], dtype)


def reference_of(model: Decoder, rows: Rows | None = None) -> Reference:
    """The reference of a training pass over ``rows``, or of an evaluation, in which nothing is drawn."""
    run = REFERENCES[model.config.family]
    if model.config.family == "shazeer":
        run = functools.partial(run, noise=noise_of(model.config, rows) if rows else {})
    elif model.config.family == "gshard":
        run = functools.partial(run, drawn=uniform_of(model.config, rows) if rows else {})
    elif model.config.family == "hash":
        tables = {i: layer.router.table for i, layer in model.moe_modules().items()}
        run = functools.partial(run, tables=tables)
    return lambda weights, hyper, rows: run(weights, hyper, documents_of(rows))


def noise_of(config: Model, rows: Rows) -> dict[int, dict[str, Tensor]]:
    """Standard normal draws by layer and gate, drawn for the experts first and then for their groups."""
    assert config.moe is not None
    select, experts = config.moe.router.select, config.moe.experts
    groups = select.groups if isinstance(select, TwoLevel) else 0

    def draw(zeros: Tensor, own: torch.Generator) -> Tensor:
        gates = (torch.randn(len(zeros), outputs, generator=own) for outputs in (experts, groups))
        return torch.cat(list(gates), 1)

    both = drawn(config, rows, experts + groups, draw)
    return {i: {"projection": z[:, :experts], "primary": z[:, experts:]} for i, z in both.items()}


def uniform_of(config: Model, rows: Rows) -> dict[int, Tensor]:
    draws = drawn(config, rows, 1, lambda zeros, own: zeros.uniform_(generator=own))
    return {i: draw_T1[:, 0] for i, draw_T1 in draws.items()}


@functools.cache
def outcomes(system: str, layout: str, dtype: torch.dtype) -> tuple[Outcome, Outcome]:
    """The built model's outcome and the reference's, computed once for the tests that look at their parts."""
    model, rows = model_of(system, dtype), rows_of(LAYOUTS[layout])
    return built(model, rows, training_with_noise), referred(model, rows, reference_of(model, rows))
