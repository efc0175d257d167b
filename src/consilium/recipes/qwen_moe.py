"""Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B (2407.10671): many experts beside one that a sigmoid gates."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA, Rope
from consilium.config.balance import Balance, SwitchLoss
from consilium.config.model import Model
from consilium.config.moe import MoE, SigmoidGated
from consilium.config.router import Raw, Router, TopK
from consilium.recipes.layout import QWEN2_MOE
from consilium.recipes.recipe import HuggingFace, Published, Recipe


def _moe(experts: int, k: int, width: int, shared: int) -> MoE:
    return MoE(
        experts=experts,
        width=width,
        router=Router(select=TopK(k=k), weight=Raw()),
        balance=Balance(losses=(SwitchLoss(coefficient=1e-3),)),
        shared=SigmoidGated(width=shared),
    )


def _size(layers: int, hidden: int, heads: int, kv_heads: int, length: int, moe: MoE) -> Model:
    return Model(
        family="qwen-moe",
        vocab_size=151936,
        hidden_size=hidden,
        layers=layers,
        attention=GQA(
            heads=heads, kv_heads=kv_heads, head_dim=hidden // heads, qkv_bias=True, rope=Rope(theta=1e6)
        ),
        moe=moe,
        max_length=length,
    )


RECIPE = Recipe(
    name="qwen-moe",
    title="Qwen1.5-MoE and Qwen2-MoE",
    year=2024,
    paper="2407.10671",
    sizes={
        "57b": _size(28, 3584, 28, 4, 32768, _moe(64, 8, 2560, 20480)),
        "a2.7b": _size(24, 2048, 16, 16, 8192, _moe(60, 4, 1408, 5632)),
        "tiny": dataclasses.replace(_size(4, 192, 6, 2, 1024, _moe(16, 4, 64, 256)), vocab_size=4096),
    },
    published={
        "57b": Published(total="57.4B", active="14B"),
        "a2.7b": Published(total="14.3B", active="2.7B", note="upcycled from Qwen-1.8B"),
    },
    choices=(
        "8 of 64 (A2.7B: 4 of 60) experts in every layer, cut finer than a dense network",
        "weights are the softmax scores, not normalised",
        "one shared network as wide as all active experts, times a sigmoid of its own gate",
        "biases on queries, keys and values; rotary base 1e6",
    ),
    equations=(
        "scores: p = softmax(W x) over the E experts, S = the k largest",
        "output: y = Σ_{i in S} p_i SwiGLU_i(x) + sigmoid(w x) SwiGLU_shared(x)",
        "loss, a layer: 0.001 (E/k) Σ_i f_i P_i, f_i choices of i a token, P_i mean of p_i",
    ),
    deviations=(
        "articles speak of 8 shared experts in the 57B model; it is one network of 8 x 2560",
        "the loss is a layer's own; transformers pools all layers, where balance gives k times as much",
    ),
    hugging_face=HuggingFace("qwen2_moe", "Qwen2MoeForCausalLM", QWEN2_MOE),
)
