"""Skywork-MoE (2406.06563): standardised gate logits and a loss whose weight follows the drops."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA
from consilium.config.balance import AdaptiveLoss, Balance
from consilium.config.model import Model
from consilium.config.moe import Capacity, MoE
from consilium.config.router import LinearGate, Router, Standardise, TopK
from consilium.recipes.layout_remote import SKYWORK_MOE
from consilium.recipes.recipe import HuggingFace, Published, Recipe


def _size(layers: int, hidden: int, heads: int, width: int, *, bias: bool = False) -> Model:
    return Model(
        family="skywork-moe",
        vocab_size=65532,
        hidden_size=hidden,
        layers=layers,
        attention=GQA(heads=heads, kv_heads=heads, head_dim=hidden // heads),
        moe=MoE(
            experts=16,
            width=width,
            router=Router(
                projection=LinearGate(bias=bias), transforms=(Standardise(scale=1.0),), select=TopK(k=2)
            ),
            admission=Capacity(factor=1.25),
            balance=Balance(losses=(AdaptiveLoss(),)),
        ),
        max_length=8192,
    )


RECIPE = Recipe(
    name="skywork-moe",
    title="Skywork-MoE",
    year=2024,
    paper="2406.06563",
    sizes={
        "146b": _size(52, 4608, 36, 12288),
        "146b-paper": _size(52, 4608, 36, 12288, bias=True),
        "tiny": dataclasses.replace(_size(4, 192, 6, 192), vocab_size=4096, max_length=1024),
    },
    published={"146b": Published(total="146B", active="22B")},
    choices=(
        "2 of 16 experts as wide as a dense network in every layer, upcycled from Skywork-13B",
        "a token's logits are standardised over the experts, so that the softmax stays sharp",
        "the two weights are divided by their sum",
        "each layer's loss has a weight of its own, which follows that layer's drop rate",
        "training has a capacity, whose drops are what the controller reads",
    ),
    equations=(
        "logits: z = W x, z' = λ (z - mean z) / std z over the experts, λ = 1 (eq. 3)",
        "weights: p = softmax(z'), S = the 2 largest, g_i = p_i / Σ_{j in S} p_j",
        "output: y = Σ_{i in S} g_i SwiGLU_i(x)",
        "loss: α Σ_i (1/E - mean of p_i)² (eq. 4)",
        "coefficient: α += 0.01 (min(d / 5, 0.01) - α) after each step, d the layer's drop rate (eq. 5-6)",
    ),
    deviations=(
        "the paper writes z = W x + b; the released gate has no bias, size 146b-paper has one",
        "the paper calls its loss the one of Switch training; it has no fractions of tokens and is another",
        "capacity factor (1.25 here) and first coefficient (0.01 here) are not stated",
        "a small epsilon guards the division by the standard deviation; the lineage of the release has none",
    ),
    hugging_face=HuggingFace("skywork_moe", "SkyworkMoeForCausalLM", SKYWORK_MOE),
)
