"""Switch Transformer (2101.03961): one expert a token, capacity, and the first of the E f P losses."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA
from consilium.config.balance import Balance, SwitchLoss
from consilium.config.feed_forward import Activation, FeedForward
from consilium.config.model import FanIn, Model
from consilium.config.moe import Capacity, MoE
from consilium.config.router import Jitter, Raw, Router, TopK
from consilium.recipes.recipe import Published, Recipe


def _size(
    experts: int, layers: int, hidden: int, heads: int, width: int, activation: Activation = "geglu"
) -> Model:
    return Model(
        family="switch",
        vocab_size=32128,
        hidden_size=hidden,
        layers=layers,
        attention=GQA(heads=heads, kv_heads=heads, head_dim=64),
        dense=FeedForward(width=width, activation=activation),
        moe=MoE(
            experts=experts,
            width=width,
            activation=activation,
            router=Router(noise=Jitter(epsilon=1e-2), select=TopK(k=1), weight=Raw()),
            admission=Capacity(factor=1.25),
            balance=Balance(losses=(SwitchLoss(coefficient=1e-2),)),
        ),
        moe_every=2,
        tied=True,
        max_length=512,
        init=FanIn(scale=0.1),
    )


def _published(total: str, active: str = "", note: str = "") -> Published:
    return Published(total=total, active=active, note=note, skeleton="other")


RECIPE = Recipe(
    name="switch",
    title="Switch Transformer",
    year=2021,
    paper="2101.03961",
    sizes={
        "c": dataclasses.replace(_size(2048, 30, 2080, 32, 6144, "relu"), dense=None, moe_every=1),
        "xxl": _size(128, 48, 4096, 64, 10240),
        "large": _size(128, 48, 1024, 16, 2816),
        "base": _size(128, 24, 768, 12, 2048),
        "tiny": dataclasses.replace(
            _size(16, 4, 192, 6, 384),
            vocab_size=4096,
            attention=GQA(heads=6, kv_heads=6, head_dim=32),
            max_length=1024,
        ),
    },
    published={
        "c": _published("1571B", note="experts in all of the 15 + 15 blocks, ReLU instead of GEGLU"),
        "xxl": _published(
            "395B", note="the paper's table says 64 experts; only 128 give its total, and the release has 128"
        ),
        "large": _published("26B"),
        "base": _published("7.4B", "0.2B", "of the encoder-decoder, 12 + 12 blocks with cross-attention"),
    },
    choices=(
        "each token visits the one expert of highest softmax; its weight is that probability, not normalised",
        "an expert takes at most 1.25 times its fair share; what overflows passes by the residual",
        "every second feed-forward network is experts (size c: every one); there is no shared expert",
        "router arithmetic in float32, its input jittered by 1% in training",
        "load-balance loss of 1e-2; weights start from a truncated normal of variance 0.1 / fan-in",
    ),
    equations=(
        "router: p = softmax(W x) in float32, i = argmax p (eq. 1)",
        "output: y = p_i FFN_i(x) (eq. 2)",
        "capacity: an expert takes (T / E) c tokens, c the capacity factor (eq. 3)",
        "loss: 0.01 E Σ_i f_i P_i, f_i fraction of tokens whose argmax is i, P_i mean of p_i (eq. 4-6)",
    ),
    deviations=(
        "published as a T5 encoder-decoder; here as many decoder blocks, without cross-attention",
        "rotary positions and scaled attention instead of T5's relative position bias",
        "its tables show negative log perplexity, of which higher is better; articles say lower",
        "the pseudo-code multiplies by experts squared written as XOR; the loss here is E * sum f P",
    ),
)
