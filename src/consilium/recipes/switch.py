"""Switch Transformer (2101.03961): one expert a token, capacity, and the first of the E f P losses."""

from __future__ import annotations

from consilium.config.attention import GQA
from consilium.config.balance import Balance, SwitchLoss
from consilium.config.feed_forward import FeedForward
from consilium.config.model import FanIn, Model
from consilium.config.moe import Capacity, MoE
from consilium.config.router import Jitter, Raw, Router, TopK
from consilium.recipes.recipe import Published, Recipe

_ROUTER = Router(noise=Jitter(epsilon=1e-2), select=TopK(k=1), weight=Raw())
_BALANCE = Balance(losses=(SwitchLoss(coefficient=1e-2),))
_CAPACITY = Capacity(factor=1.25)
_INIT = FanIn(scale=0.1)

_BASE = Model(
    family="switch",
    vocab_size=32128,
    hidden_size=768,
    layers=24,
    attention=GQA(heads=12, kv_heads=12, head_dim=64),
    dense=FeedForward(width=2048, activation="geglu"),
    moe=MoE(
        experts=128, width=2048, activation="geglu", router=_ROUTER, admission=_CAPACITY, balance=_BALANCE
    ),
    moe_every=2,
    tied=True,
    max_length=512,
    init=_INIT,
)

_TINY = Model(
    family="switch",
    vocab_size=4096,
    hidden_size=192,
    layers=4,
    attention=GQA(heads=6, kv_heads=6, head_dim=32),
    dense=FeedForward(width=384, activation="geglu"),
    moe=MoE(experts=16, width=384, activation="geglu", router=_ROUTER, admission=_CAPACITY, balance=_BALANCE),
    moe_every=2,
    tied=True,
    max_length=1024,
    init=_INIT,
)

RECIPE = Recipe(
    name="switch",
    title="Switch Transformer",
    year=2021,
    paper="2101.03961",
    sizes={"base": _BASE, "tiny": _TINY},
    published={
        "base": Published(
            total="7.4B", active="0.2B", note="of the encoder-decoder, 12 + 12 blocks with cross-attention"
        )
    },
    choices=(
        "each token visits the one expert of highest softmax; its weight is that probability, not normalised",
        "an expert takes at most 1.25 times its fair share; the residual carries what overflows",
        "every second feed-forward network is 128 experts; there is no shared expert",
        "router arithmetic in float32, its input jittered by 1% in training",
        "load-balance loss of 1e-2; weights start from a truncated normal of variance 0.1 / fan-in",
    ),
    deviations=(
        "published as a T5 encoder-decoder; here 24 decoder blocks without cross-attention",
        "rotary positions and scaled attention instead of T5's relative position bias",
        "the pseudo-code multiplies by experts squared written as XOR; the loss here is E * sum f P",
    ),
)
