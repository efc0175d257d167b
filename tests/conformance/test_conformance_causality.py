"""What comes later changes nothing that was routed before, or the configuration says that it does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.config.moe import Capacity, DeviceCapacity, MoE
from consilium.config.router import (
    ExpertChoice,
    Hash,
    Normalised,
    Raw,
    Relu,
    Router,
    SampledSecond,
    Softmax,
    SoftmaxOfSelected,
    Threshold,
    TopK,
    TopP,
    TwoLevel,
)
from consilium.conformance import suite as conformance
from consilium.moe.admission import admit
from consilium.moe.routing.router import Router as RouterModule
from consilium.moe.types import LayerMode, Routing, Tokens

TOKENS, HIDDEN, EXPERTS = 14, 6, 8


def moe(select: object, admission: object | None = None, **rules: object) -> MoE:
    options = {} if admission is None else {"admission": admission}
    return MoE(experts=EXPERTS, width=1, router=Router(select=select, **rules), **options)


SELECTORS = {
    "top-k": moe(TopK(k=3), weight=Raw()),
    "sampled second": moe(SampledSecond(), weight=Normalised()),
    "threshold": moe(Threshold(most=4), score=Relu(), weight=Raw()),
    "top-p": moe(TopP(p=0.6, most=4), weight=Raw()),
    "expert choice": moe(ExpertChoice(), weight=Raw()),
    "hash": moe(Hash(k=2, vocab_size=50), weight=Raw()),
    "two levels": moe(TwoLevel(groups=4, keep=2, k=1), score=Softmax(), weight=SoftmaxOfSelected()),
    "first come, one choice": moe(TopK(k=1), Capacity(factor=0.5, scope="always"), weight=Raw()),
    "first come, two choices": moe(TopK(k=2), Capacity(factor=0.5, scope="always")),
    "first come, two choices, in training": moe(TopK(k=2), Capacity(factor=0.5)),
    "by probability, in training": moe(TopK(k=1), Capacity(factor=0.5, by="probability"), weight=Raw()),
    "by device, in training": moe(TopK(k=2), DeviceCapacity(devices=2, factor=0.5, exempt=0.0)),
}
RECIPES = {vectors.model: vectors.moe(vectors.cases[0]) for vectors in conformance.shipped()}
SYSTEMS = SELECTORS | RECIPES
NOT_CAUSAL = {"expert choice", "first come, two choices", "expert-choice:8b-64e"}
NOT_IN_TRAINING = NOT_CAUSAL | {
    "first come, two choices, in training",
    "by probability, in training",
    "by device, in training",
    "gshard:600b",
    "skywork-moe:146b",
    "deepseek-v2:236b",
}


def test_the_configuration_says_what_is_causal() -> None:
    assert {name for name, config in SYSTEMS.items() if not config.causal} == NOT_CAUSAL
    assert {name for name, config in SYSTEMS.items() if not config.causal_in_training} == NOT_IN_TRAINING


def tight(config: MoE) -> MoE:
    """The same rules with so little room that drops happen among a few tokens."""
    match config.admission:
        case Capacity() | DeviceCapacity():
            return dataclasses.replace(config, admission=dataclasses.replace(config.admission, factor=0.5))
        case _:
            return config


def past(config: MoE, seed: int, later: int, mode: LayerMode) -> list[torch.Tensor]:
    """Experts, weights and what is admitted of the first half, with a second half drawn from ``later``."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(TOKENS, HIDDEN, generator=generator)
    ids_T = torch.randint(8, (TOKENS,), generator=generator)
    module = RouterModule(config.router, HIDDEN, config.experts)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    half, other = TOKENS // 2, torch.Generator().manual_seed(later)
    x_TD[half:] = 3 * torch.randn(TOKENS - half, HIDDEN, generator=other)
    ids_T[half:] = torch.randint(8, (TOKENS - half,), generator=other)
    place_T = torch.arange(TOKENS)
    every = Tokens(ids_T, torch.zeros_like(place_T), place_T, torch.ones(TOKENS, dtype=torch.bool))
    bias_E = torch.linspace(-2, 2, config.experts)
    mode = dataclasses.replace(mode, generator=torch.Generator().manual_seed(seed))
    routing = module(x_TD, bias_E, every, mode)
    admitted: Routing = admit(routing, every, config.admission, mode)
    keep_TK = routing.keep_TK[:half]
    return [
        routing.experts_TK[:half].masked_fill(~keep_TK, -1),
        routing.weights_TK[:half],
        admitted.keep_TK[:half],
    ]


def same_past(config: MoE, seed: int, later: int, mode: LayerMode) -> bool:
    pairs = zip(past(config, seed, -1 - later, mode), past(config, seed, later, mode), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("name", sorted(set(SYSTEMS) - NOT_CAUSAL))
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), later=st.integers(0, 10**6))
def test_the_future_changes_no_routing_of_the_past(name: str, seed: int, later: int) -> None:
    assert same_past(SYSTEMS[name], seed, later, LayerMode())


@pytest.mark.parametrize("name", sorted(set(SYSTEMS) - NOT_IN_TRAINING))
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), later=st.integers(0, 10**6))
def test_nor_in_training_with_its_noise_and_drops(name: str, seed: int, later: int) -> None:
    assert same_past(tight(SYSTEMS[name]), seed, later, LayerMode(training=True))


@pytest.mark.parametrize("name", sorted(NOT_IN_TRAINING))
def test_what_is_said_not_to_be_causal_is_not(name: str) -> None:
    """One seed of fifty is enough to show it."""
    mode = LayerMode(training=name not in NOT_CAUSAL)
    assert not all(same_past(tight(SYSTEMS[name]), seed, seed + 1, mode) for seed in range(50))
