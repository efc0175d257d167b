"""Qwen3-30B-A3B and 235B-A22B (2505.09388): normalised top-8 of 128, balanced over the global batch."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA, Rope
from consilium.config.balance import Balance, SwitchLoss
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.router import Router, TopK
from consilium.recipes.layout import QWEN3_MOE
from consilium.recipes.recipe import HuggingFace, Published, Recipe


def _moe(experts: int, k: int, width: int) -> MoE:
    return MoE(
        experts=experts,
        width=width,
        router=Router(select=TopK(k=k)),
        balance=Balance(losses=(SwitchLoss(coefficient=1e-3, scope="global"),)),
    )


def _size(layers: int, hidden: int, heads: int, kv_heads: int, moe: MoE) -> Model:
    return Model(
        family="qwen3-moe",
        vocab_size=151936,
        hidden_size=hidden,
        layers=layers,
        attention=GQA(heads=heads, kv_heads=kv_heads, head_dim=128, qk_norm="head", rope=Rope(theta=1e6)),
        moe=moe,
        max_length=40960,
    )


RECIPE = Recipe(
    name="qwen3-moe",
    title="Qwen3-MoE",
    year=2025,
    paper="2505.09388",
    sizes={
        "235b": _size(94, 4096, 64, 4, _moe(128, 8, 1536)),
        "30b": _size(48, 2048, 32, 4, _moe(128, 8, 768)),
        "tiny": dataclasses.replace(
            _size(4, 192, 6, 2, _moe(32, 4, 64)),
            vocab_size=4096,
            attention=GQA(heads=6, kv_heads=2, head_dim=32, qk_norm="head", rope=Rope(theta=1e6)),
            max_length=1024,
        ),
    },
    published={
        "235b": Published(total="235B", active="22B"),
        "30b": Published(total="30.5B", active="3.3B"),
    },
    choices=(
        "8 of 128 experts in every layer; no shared expert, unlike Qwen1.5 and Qwen2",
        "softmax over all experts, the 8 weights divided by their sum",
        "the loss takes its fractions from the global batch, so that sequences may specialise (2501.11873)",
        "each head's queries and keys are normed before the rotation; no biases; heads of 128 at any width",
    ),
    equations=(
        "scores: p = softmax(W x) over the E experts, S = the k largest",
        "weights: g_i = p_i / Σ_{j in S} p_j",
        "output: y = Σ_{i in S} g_i SwiGLU_i(x)",
        "loss, a layer: 0.001 (E/k) Σ_i f_i P_i, f_i of the global batch, P_i of the micro-batch",
    ),
    deviations=(
        "the loss is a layer's own; transformers pools the layers of one micro-batch",
        "the coefficient 0.001 is that of the released configuration; the report gives none",
    ),
    hugging_face=HuggingFace("qwen3_moe", "Qwen3MoeForCausalLM", QWEN3_MOE),
)
