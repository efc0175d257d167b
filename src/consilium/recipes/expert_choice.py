"""Expert choice (2202.09368): each expert takes its best tokens, so the load is even by construction."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.router import ExpertChoice, Raw, Router
from consilium.recipes.recipe import Published, Recipe


def _size(experts: int, layers: int, hidden: int, heads: int, width: int) -> Model:
    return Model(
        family="expert-choice",
        vocab_size=256000,
        hidden_size=hidden,
        layers=layers,
        attention=GQA(heads=heads, kv_heads=heads, head_dim=hidden // heads),
        dense=FeedForward(width=width, activation="geglu"),
        moe=MoE(
            experts=experts,
            width=width,
            activation="gelu",
            router=Router(select=ExpertChoice(factor=2.0), weight=Raw()),
        ),
        moe_every=2,
        tied=True,
        max_length=1024,
    )


RECIPE = Recipe(
    name="expert-choice",
    title="Expert choice",
    year=2022,
    paper="2202.09368",
    sizes={
        "8b-64e": _size(64, 32, 4096, 32, 16384),
        "0.1b-64e": _size(64, 12, 768, 12, 3072),
        "tiny": dataclasses.replace(_size(16, 4, 192, 6, 384), vocab_size=4096),
    },
    published={
        "8b-64e": Published(total="143B", active="9.8B", note="active leaves the embedding out"),
        "0.1b-64e": Published(total="1.9B", note="without the embedding", skeleton="other"),
    },
    choices=(
        "every expert takes as many tokens, its best 2 T / E; a token may get any number of experts",
        "no loss and no capacity: balance is exact, and what nobody picks passes by the residual",
        "weights are the scores, a softmax over the experts, not normalised",
        "not causal: which tokens an expert takes depends on later tokens of the batch",
    ),
    equations=(
        "scores: S = softmax(X W), a row a token, softmax over the experts (eq. 2)",
        "selection: expert e takes the c T / E tokens with the highest S[:, e], c = 2",
        "output: y_t = Σ of S[t, e] FFN_e(x_t) over the experts that took t",
    ),
    deviations=(
        "a decoder of it sees the future in training and not while generating: it is here for study",
        "dimensions are from memory (those of GLaM) and give the published totals",
        "rotary positions instead of relative ones",
        "experts have two matrices and GELU, dense blocks three and a gate, as in GLaM (from memory)",
        "the entropy-regularised variant with at most so many experts a token is left out",
    ),
)
