"""Mixtral 8x7B and 8x22B (2401.04088): two of eight experts in every layer, no shared expert."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA, Rope
from consilium.config.balance import Balance, SwitchLoss
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.router import Router, TopK
from consilium.recipes.layout import MIXTRAL
from consilium.recipes.recipe import HuggingFace, Published, Recipe


def _size(layers: int, hidden: int, heads: int, kv_heads: int, width: int, length: int) -> Model:
    return Model(
        family="mixtral",
        vocab_size=32000,
        hidden_size=hidden,
        layers=layers,
        attention=GQA(heads=heads, kv_heads=kv_heads, head_dim=hidden // heads, rope=Rope(theta=1e6)),
        moe=MoE(
            experts=8,
            width=width,
            router=Router(select=TopK(k=2)),
            balance=Balance(losses=(SwitchLoss(coefficient=0.02),)),
        ),
        norm_epsilon=1e-5,
        max_length=length,
    )


RECIPE = Recipe(
    name="mixtral",
    title="Mixtral of Experts",
    year=2024,
    paper="2401.04088",
    sizes={
        "8x22b": _size(56, 6144, 48, 8, 16384, 65536),
        "8x7b": _size(32, 4096, 32, 8, 14336, 32768),
        "tiny": dataclasses.replace(_size(4, 192, 6, 2, 256, 1024), vocab_size=4096),
    },
    published={
        "8x22b": Published(total="141B", active="39B", note="vocabulary of 32000; later releases have 32768"),
        "8x7b": Published(
            total="47B", active="13B", note="8 x 7B is not 56B: attention and embeddings are shared"
        ),
    },
    choices=(
        "every layer routes to 2 of 8 experts as wide as a dense network",
        "softmax over all experts, the two weights divided by their sum, which is a softmax over the two",
        "grouped-query attention with 8 key and value heads, rotary base 1e6",
        "one load-balance loss; no capacity, no shared expert",
    ),
    equations=(
        "router: z = x W, S = the 2 largest of 8",
        "weights: g_i = exp(z_i) / Σ_{j in S} exp(z_j) (section 2.1)",
        "output: y = Σ_{i in S} g_i SwiGLU_i(x)",
        "loss, a layer: 0.02 (E/k) Σ_i f_i P_i, f_i choices of i a token, P_i mean softmax",
    ),
    deviations=(
        "the coefficient 0.02 is that of the released 8x7B, from memory; 8x22B has the same here",
        "the loss is a layer's own, 0.02 at balance; transformers pools all layers and has k times that",
    ),
    hugging_face=HuggingFace("mixtral", "MixtralForCausalLM", MIXTRAL),
)
