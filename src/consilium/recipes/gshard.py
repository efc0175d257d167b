"""GShard (2006.16668): top-2 with a sampled second expert, capacity in local groups."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA
from consilium.config.balance import Balance, SwitchLoss
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.config.moe import Capacity, MoE
from consilium.config.router import Router, SampledSecond
from consilium.recipes.recipe import Published, Recipe

_TRANSLATION = "of the encoder-decoder for translation; layers count both halves"


def _size(experts: int, layers: int, group: int = 2048) -> Model:
    return Model(
        family="gshard",
        vocab_size=64000,
        hidden_size=1024,
        layers=layers,
        attention=GQA(heads=16, kv_heads=16, head_dim=128),
        dense=FeedForward(width=8192, activation="relu"),
        moe=MoE(
            experts=experts,
            width=8192,
            activation="relu",
            router=Router(select=SampledSecond()),
            admission=Capacity(factor=1.0, group_tokens=group),
            balance=Balance(losses=(SwitchLoss(coefficient=1e-2, counts="first"),)),
        ),
        moe_every=2,
        tied=True,
        max_length=1024,
    )


def _tiny() -> Model:
    small = _size(16, 4, group=128)
    assert small.moe is not None
    return dataclasses.replace(
        small,
        vocab_size=4096,
        hidden_size=192,
        attention=GQA(heads=6, kv_heads=6, head_dim=32),
        dense=FeedForward(width=384, activation="relu"),
        moe=dataclasses.replace(small.moe, width=384),
    )


def _published(total: str) -> Published:
    return Published(total=total, note=_TRANSLATION, skeleton="other")


RECIPE = Recipe(
    name="gshard",
    title="GShard",
    year=2020,
    paper="2006.16668",
    sizes={
        "1t": _size(2048, 60),
        "600b": _size(2048, 36),
        "200b": _size(2048, 12),
        "150b": _size(512, 36),
        "50b": _size(512, 12),
        "37b": _size(128, 36),
        "12.5b": _size(128, 12),
        "tiny": _tiny(),
    },
    published={
        "1t": Published(
            total="1T", note=f"{_TRANSLATION}; numerically unstable in bfloat16", skeleton="other"
        ),
        "600b": _published("600B"),
        "200b": _published("200B"),
        "150b": _published("150B"),
        "50b": _published("50B"),
        "37b": _published("37B"),
        "12.5b": _published("12.5B"),
    },
    choices=(
        "every second feed-forward network is a layer of experts; each token visits at most two",
        "the second expert is the second best; in training it is dispatched with probability min(1, 2 g2)",
        "the two weights are divided by their sum before anything is dropped",
        "tokens compete in local groups: of a group of S tokens an expert takes the first 2 S / E",
        "a choice that overflows adds nothing and the residual carries the token",
    ),
    equations=(
        "router: p = softmax(W x), the two best e1, e2; g1 = p1 / (p1 + p2), g2 = p2 / (p1 + p2) (alg. 1)",
        "capacity: an expert takes C = 2 S / E choices of a group, all first choices before any second",
        "second expert: dispatched when 2 g2 > u, u uniform in (0, 1); rejected it has still taken a place",
        "output: y = Σ of g_j FFN_j(x) over the admitted choices",
        "loss: (1/E) Σ_e (c_e / S) m_e, c_e first choices of e, m_e mean probability; ours is E² times it",
    ),
    deviations=(
        "published as an encoder-decoder for translation; here a decoder of as many blocks",
        "rotary positions and RMSNorm instead of the paper's; embedding and head are one matrix",
        "vocabulary (64,000), head size (16 of 128) and tokens a group (2,048) are from memory or assumed",
        "the loss is a product over the micro-batch, the paper's one a group; the two agree for one group",
        "the weight of the loss is not given in the paper; 0.01 on our scale is the usual choice",
    ),
)
