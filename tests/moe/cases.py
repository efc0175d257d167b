"""Every router of the literature as a small MoE layer, and the values that tests route.

Legend: T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from consilium.config.balance import Balance, LinearBias, SignBias
from consilium.config.moe import AlwaysOn, Capacity, MoE, Shared, SigmoidGated
from consilium.config.router import (
    ClampedSum,
    ExpertChoice,
    Groups,
    Hash,
    LearnedNoise,
    MLPGate,
    NoGate,
    Normalised,
    Raw,
    Relu,
    Router,
    SampledSecond,
    Sigmoid,
    Softcap,
    SoftmaxOfSelected,
    SqrtSoftplus,
    Standardise,
    Threshold,
    TopK,
    TopP,
    TwoLevel,
    Uniform,
)
from consilium.moe.layer import MoELayer
from consilium.moe.types import Routing, Tokens

HIDDEN = 12
EXPERTS = 8
VOCABULARY = 50


def moe(router: Router, shared: Shared | None = None, **options: object) -> MoE:
    """Eight experts of width 6; squared ReLU would hide signs, so SwiGLU unless asked otherwise."""
    extra = {"shared": shared} if shared is not None else {}
    return MoE(experts=EXPERTS, width=6, router=router, **extra, **options)


V3 = Router(
    score=Sigmoid(),
    offset="scores",
    select=TopK(k=3, groups=Groups(count=4, keep=2, score="top2_sum")),
    weight=Normalised(),
    scale=2.5,
)
V2 = Router(select=TopK(k=3, groups=Groups(count=4, keep=2, score="max")), weight=Raw(), scale=16.0)

SYSTEMS: dict[str, MoE] = {
    "dense": moe(Router(select=TopK(k=EXPERTS), weight=Raw())),
    "shazeer": moe(Router(noise=LearnedNoise(), select=TopK(k=3), weight=SoftmaxOfSelected())),
    "gshard": moe(
        Router(select=SampledSecond()), admission=Capacity(factor=1.0, scope="always"), activation="relu"
    ),
    "switch": moe(
        Router(select=TopK(k=1), weight=Raw()),
        admission=Capacity(factor=1.0, scope="always"),
        activation="geglu",
    ),
    "by probability": moe(
        Router(select=TopK(k=2)), admission=Capacity(factor=0.75, by="probability", scope="always")
    ),
    "mixtral": moe(Router(select=TopK(k=2), weight=SoftmaxOfSelected())),
    "llama-moe": moe(Router(projection=MLPGate(), select=TopK(k=2), weight=SoftmaxOfSelected(), scale=4.0)),
    "deepseek-v2": moe(V2, AlwaysOn(count=2, width=6)),
    "deepseek-v3": moe(V3, AlwaysOn(width=6), balance=Balance(bias=SignBias())),
    "qwen2-moe": moe(Router(select=TopK(k=4), weight=Raw()), SigmoidGated(width=10)),
    "skywork": moe(Router(transforms=(Standardise(scale=2.0),), select=TopK(k=2))),
    "laguna": moe(
        Router(transforms=(Softcap(cap=2.0),), score=Sigmoid(), offset="scores", select=TopK(k=2)),
        balance=Balance(bias=LinearBias()),
    ),
    "kolibri": moe(Router(score=Sigmoid(), offset="logits", select=TopK(k=2), weight=Raw())),
    "ernie": moe(Router(offset="scores", select=TopK(k=2), weight=ClampedSum(minimum=0.6))),
    "llama-4": moe(
        Router(score=Sigmoid(), select=TopK(k=1), weight=Raw(), weight_on="input"), AlwaysOn(width=6)
    ),
    "hash": moe(Router(select=Hash(k=2, vocab_size=VOCABULARY), weight=Uniform())),
    "deepseek-v4 hash": moe(
        Router(score=SqrtSoftplus(), select=Hash(k=2, vocab_size=VOCABULARY), weight=Normalised(), scale=1.5)
    ),
    "hash without a gate": moe(
        Router(projection=NoGate(), select=Hash(k=2, vocab_size=VOCABULARY), weight=Uniform(), scale=0.5)
    ),
    "hierarchical": moe(
        Router(noise=LearnedNoise(), select=TwoLevel(groups=4, keep=3, k=2), weight=SoftmaxOfSelected())
    ),
    "hierarchical, wide groups": moe(
        Router(select=TwoLevel(groups=2, keep=2, k=3), weight=SoftmaxOfSelected(), scale=1.5)
    ),
    "latent": moe(V3, AlwaysOn(count=2, width=6), latent=5, activation="squared_relu"),
    "latent, weights on input": moe(
        Router(score=Sigmoid(), select=TopK(k=2), weight=Raw(), weight_on="input"), latent=7
    ),
    "local groups": moe(
        Router(select=SampledSecond()), admission=Capacity(factor=0.9, scope="always", group_tokens=5)
    ),
    "local groups by probability": moe(
        Router(select=TopK(k=3)),
        admission=Capacity(factor=0.6, by="probability", scope="always", group_tokens=7),
    ),
    "expert choice": moe(Router(select=ExpertChoice(factor=2.0), weight=Raw())),
    "relu": moe(Router(score=Relu(), select=Threshold(most=5), weight=Raw()), activation="squared_relu"),
    "top-p": moe(Router(select=TopP(p=0.5, most=4), weight=Raw()), activation="gelu"),
}
LOCAL = [name for name in SYSTEMS if name.startswith("local groups")]
DROPPING = ["switch", "gshard", "by probability", *LOCAL]
CAUSAL = [
    name
    for name, config in SYSTEMS.items()
    if not isinstance(config.router.select, ExpertChoice) and not isinstance(config.admission, Capacity)
]


def layer(config: MoE, seed: int = 0, hidden: int = HIDDEN) -> MoELayer:
    """A float32 layer with drawn weights and, where it selects with a bias, a negative bias throughout."""
    generator = torch.Generator().manual_seed(seed)
    built = MoELayer(config, hidden, 0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, 0.5, generator=generator)
        if built.balance.bias_E is not None:
            built.balance.bias_E.uniform_(-1.5, -1.0, generator=generator)
    return built


def vectors(count: int, seed: int = 1, hidden: int = HIDDEN) -> Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, sequences: int = 3, padding: int = 0, seed: int = 2) -> Tokens:
    """Sequences of nearly equal length in a row; the last ``padding`` tokens are not valid."""
    generator = torch.Generator().manual_seed(seed)
    sequence_T = torch.arange(count) * sequences // max(count, 1)
    position_T = torch.arange(count) - torch.searchsorted(sequence_T, sequence_T)
    ids_T = torch.randint(VOCABULARY, (count,), generator=generator)
    return Tokens(ids_T, sequence_T, position_T, torch.arange(count) < count - padding, sequences=sequences)


def some_tokens(every: Tokens, index_T: Tensor) -> Tokens:
    names = ("ids_T", "sequence_T", "position_T", "valid_T")
    return replace(every, **{name: getattr(every, name)[index_T] for name in names})


def decision(
    scores_TE: Tensor,
    experts_TK: Tensor,
    keep_TK: Tensor,
    weights_TK: Tensor | None = None,
    logits_TE: Tensor | None = None,
    **extra: Any,
) -> Routing:
    """A routing that wants what it keeps; weights are scores and logits are too unless given."""
    logits_TE = scores_TE if logits_TE is None else logits_TE
    weights_TK = scores_TE.gather(1, experts_TK) if weights_TK is None else weights_TK
    masks = {"considered_TK": keep_TK, "wanted_TK": keep_TK, "keep_TK": keep_TK}
    return Routing(logits_TE, scores_TE, experts_TK, weights_TK, clean_TE=logits_TE, **masks, **extra)
