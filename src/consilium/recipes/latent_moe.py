"""LatentMoE (2601.18089) as in Nemotron-3 Super (2604.12374): experts that work in a narrower space."""

from __future__ import annotations

from consilium.config.attention import GQA
from consilium.config.balance import Balance, LinearBias, SequenceLoss, SignBias
from consilium.config.model import Model
from consilium.config.moe import AlwaysOn, MoE
from consilium.config.router import Router, Sigmoid, TopK
from consilium.recipes.recipe import Published, Recipe

_SUPER = Model(
    family="latent-moe",
    vocab_size=131072,
    hidden_size=4096,
    layers=40,
    attention=GQA(heads=32, kv_heads=2, head_dim=128),
    moe=MoE(
        experts=512,
        width=2688,
        latent=1024,
        activation="squared_relu",
        router=Router(score=Sigmoid(), offset="scores", select=TopK(k=22), scale=5.0),
        balance=Balance(losses=(SequenceLoss(coefficient=1e-4),), bias=SignBias(rate=1e-3)),
        shared=AlwaysOn(count=1, width=5376),
    ),
    norm_epsilon=1e-5,
    max_length=8192,
)

_TINY = Model(
    family="latent-moe",
    vocab_size=4096,
    hidden_size=192,
    layers=4,
    attention=GQA(heads=6, kv_heads=2, head_dim=32),
    moe=MoE(
        experts=64,
        width=96,
        latent=48,
        activation="squared_relu",
        router=Router(score=Sigmoid(), offset="scores", select=TopK(k=8)),
        # The rule of deepseek-v3:tiny, for the same few hundred steps.
        balance=Balance(losses=(SequenceLoss(coefficient=3e-3),), bias=LinearBias(rate=0.006)),
        shared=AlwaysOn(count=1, width=192),
    ),
    norm_epsilon=1e-5,
    max_length=1024,
)

RECIPE = Recipe(
    name="latent-moe",
    title="LatentMoE",
    year=2026,
    paper="2601.18089",
    sizes={"super": _SUPER, "tiny": _TINY},
    published={
        "super": Published(
            total="120.6B",
            active="12.7B",
            note="Nemotron-3 Super: 40 Mamba-2, 40 expert and 8 attention layers, one part a layer",
            skeleton="other",
        )
    },
    choices=(
        "experts work in a quarter of the hidden size, between one projection down and one up",
        "what that saves in weights and traffic is spent on 4 times the experts and more of them active",
        "router and shared expert read the full hidden state",
        "sigmoid scores, a selection bias, 22 of 512 experts, weights over their sum times 5",
        "squared ReLU, two matrices an expert",
    ),
    equations=(
        "scores: s = sigmoid(W x), S = the 22 largest of s + b, g_i = 5 s_i / Σ_{j in S} s_j",
        "experts: z = W_down x, v = Σ_{i in S} g_i FFN_i(z), y = W_up v + FFN_shared(x)",
        "bias, after each step: b_i += 0.001 sign(mean load - load_i)",
        "sequence loss: 1e-4 Σ_i f_i P_i over each sequence",
    ),
    deviations=(
        "the experts of Nemotron-3 Super with grouped-query attention in place of Mamba-2",
        "40 blocks of attention and experts instead of 88 layers of one part each",
        "attention is rotary here; there it has no positions, because Mamba-2 knows the order",
        "the rate of the bias is DeepSeek-V3's (assumed); the tiny size has a linear rule and no factor 5",
        "dimensions come from released configurations and reports at second hand",
    ),
)
