"""What the known mistakes in routers do to random tokens: expert sets that change, and weights.

A mistake that is another choice of the configuration is made by configuration. The others are made here, and
nowhere in the package.

Legend: T tokens, D inputs of a gate, E experts, G groups of N experts, K choices a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from consilium.config import io
from consilium.config.moe import MoE
from consilium.config.router import Groups, TopK
from consilium.moe.routing.router import Router
from consilium.moe.types import LayerMode, Routing, Tokens
from consilium.recipes import catalogue

TOKENS, INPUTS = 10_000, 256


@dataclass(frozen=True, slots=True)
class Effect:
    """One mistake in one system."""

    model: str
    mistake: str
    sets: float
    """Share of tokens that use other experts."""
    weight: float
    """Largest change of a weight, over all tokens and experts."""


@dataclass(frozen=True, slots=True)
class Leak:
    """A mask of 0.0 in place of -inf, under selection biases of one mean."""

    mean: float
    share: float
    """Share of tokens that use an expert of a closed group."""


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal float64 values, the same on every machine."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def moe(model: str) -> MoE:
    config = catalogue.recipe(model).moe
    assert config is not None
    return config


@torch.no_grad()
def routed(config: MoE, logits_TE: Tensor, bias_E: Tensor) -> Routing:
    """Our router with an identity for its gate."""
    experts = config.experts
    module = Router(config.router, experts, experts)
    module.projection.get_parameter("weight").copy_(torch.eye(experts))
    place_T = torch.arange(logits_TE.shape[0])
    valid_T = torch.ones_like(place_T, dtype=torch.bool)
    tokens = Tokens(place_T, torch.zeros_like(place_T), place_T, valid_T)
    return module(logits_TE.float(), bias_E.float(), tokens, LayerMode())


def spread(routing: Routing) -> Tensor:
    """Weights [T, E], NaN where an expert is not used."""
    out_TE = torch.full_like(routing.scores_TE, torch.nan)
    return out_TE.scatter(1, routing.experts_TK, routing.weights_TK)


def effect(model: str, mistake: str, right: Routing, wrong: Routing) -> Effect:
    right_TE, wrong_TE = spread(right), spread(wrong)
    moved_T = (right_TE.isnan() != wrong_TE.isnan()).any(dim=1)
    change_TE = (right_TE.nan_to_num(0) - wrong_TE.nan_to_num(0)).abs()
    return Effect(model, mistake, float(moved_T.double().mean()), float(change_TE.max()))


def inputs(experts: int) -> tuple[Tensor, Tensor]:
    """Token vectors [T, D] and a gate [E, D] that give standard normal logits."""
    return normal(TOKENS, INPUTS, seed=1), normal(experts, INPUTS, seed=2) / INPUTS**0.5


def biases(config: MoE, mean: float = 0.0) -> Tensor:
    """Selection biases that differ by about a tenth, which is a tenth of the range of sigmoid scores."""
    return mean + normal(config.experts, seed=3) / 10


def by_configuration(model: str, mistake: str, **rules: str) -> Effect:
    """Keys of ``rules`` are those of the router, with two underscores for a dot."""
    config = moe(model)
    changed = {f"router.{key.replace('__', '.')}": text for key, text in rules.items()}
    x_TD, gate_ED = inputs(config.experts)
    logits_TE, bias_E = x_TD @ gate_ED.T, torch.zeros(config.experts)
    right = routed(config, logits_TE, bias_E)
    return effect(model, mistake, right, routed(io.replace(config, changed), logits_TE, bias_E))


def bfloat16_gate(model: str) -> Effect:
    """Inputs, gate and logits rounded to bfloat16; sums exact, as those of a good kernel nearly are."""
    config = moe(model)
    x_TD, gate_ED = inputs(config.experts)
    rounded_TE = (x_TD.bfloat16().double() @ gate_ED.bfloat16().double().T).bfloat16()
    bias_E = torch.zeros(config.experts)
    right = routed(config, x_TD @ gate_ED.T, bias_E)
    return effect(model, "gate in bfloat16", right, routed(config, rounded_TE, bias_E))


def biased_weights(model: str) -> Effect:
    """The weights are made of scores plus bias."""
    config = moe(model)
    x_TD, gate_ED = inputs(config.experts)
    bias_E = biases(config)
    right = routed(config, x_TD @ gate_ED.T, bias_E)
    scores_TK = (right.scores_TE + bias_E.float()).gather(1, right.experts_TK)
    weights_TK = scores_TK / scores_TK.sum(dim=1, keepdim=True) * config.router.scale
    wrong = dataclasses.replace(right, weights_TK=weights_TK)
    return effect(model, "bias inside the weight", right, wrong)


def zero_masks(model: str, means: tuple[float, ...]) -> Iterator[Leak]:
    """Closed groups get 0.0, which beats any open expert whose score plus bias is negative."""
    config = moe(model)
    x_TD, gate_ED = inputs(config.experts)
    select = config.router.select
    assert isinstance(select, TopK)
    assert select.groups is not None
    for mean in means:
        bias_E = biases(config, mean)
        scores_TE = torch.sigmoid(x_TD @ gate_ED.T) + bias_E
        closed_TE = closed(scores_TE, select.groups)
        chosen_TK = scores_TE.masked_fill(closed_TE, 0.0).topk(select.k, dim=1).indices
        yield Leak(mean, float(closed_TE.gather(1, chosen_TK).any(dim=1).double().mean()))


def closed(scores_TE: Tensor, groups: Groups) -> Tensor:
    """Experts, as bool [T, E], outside the groups whose two best are the highest."""
    scores_TGN = scores_TE.unflatten(1, (groups.count, -1))
    best_TG = scores_TGN.topk(2, dim=2).values.sum(dim=2)
    open_TG = torch.zeros_like(best_TG).scatter(1, best_TG.topk(groups.keep, dim=1).indices, 1.0)
    return (open_TG == 0)[:, :, None].expand_as(scores_TGN).flatten(1)


V2, V3, MIXTRAL, QWEN3 = "deepseek-v2:236b", "deepseek-v3:671b", "mixtral:8x7b", "qwen3-moe:235b"
MEANS = (0.0, -0.3, -0.6, -0.7, -0.8, -0.9, -1.0, -2.0)

MISTAKES: tuple[Callable[[], Effect], ...] = (
    lambda: by_configuration(
        V2, "groups by their two best instead of their best", select__groups__score="top2_sum"
    ),
    lambda: by_configuration(V2, "no limit of groups", select__groups="null"),
    lambda: bfloat16_gate(V2),
    lambda: by_configuration(V2, "weights divided by their sum", weight="{kind: normalised}"),
    lambda: by_configuration(V2, "factor 16 forgotten", scale="1.0"),
    lambda: by_configuration(
        V3, "groups by their best instead of their two best", select__groups__score="max"
    ),
    lambda: by_configuration(V3, "no limit of groups", select__groups="null"),
    lambda: bfloat16_gate(V3),
    lambda: biased_weights(V3),
    lambda: by_configuration(V3, "weights not divided by their sum", weight="{kind: raw}"),
    lambda: by_configuration(V3, "factor 2.5 forgotten", scale="1.0"),
    lambda: bfloat16_gate(MIXTRAL),
    lambda: by_configuration(MIXTRAL, "softmax before top-k, not divided by the sum", weight="{kind: raw}"),
    lambda: bfloat16_gate(QWEN3),
    lambda: by_configuration(QWEN3, "weights not divided by their sum", weight="{kind: raw}"),
)
