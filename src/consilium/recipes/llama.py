"""Llama 2 (2307.09288) and DeepSeek 67B (2401.02954): dense decoders to measure sparse ones against."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.recipes.layout import LLAMA
from consilium.recipes.recipe import HuggingFace, Published, Recipe


def _size(layers: int, hidden: int, heads: int, kv_heads: int, width: int) -> Model:
    return Model(
        family="llama",
        vocab_size=32000,
        hidden_size=hidden,
        layers=layers,
        attention=GQA(heads=heads, kv_heads=kv_heads, head_dim=hidden // heads),
        dense=FeedForward(width=width),
        norm_epsilon=1e-5,
        max_length=4096,
    )


RECIPE = Recipe(
    name="llama",
    title="Llama 2",
    year=2023,
    paper="2307.09288",
    sizes={
        "70b": _size(80, 8192, 64, 8, 28672),
        "deepseek-67b": dataclasses.replace(
            _size(95, 8192, 64, 8, 22016), vocab_size=102400, norm_epsilon=1e-6
        ),
        "13b": _size(40, 5120, 40, 40, 13824),
        "7b": _size(32, 4096, 32, 32, 11008),
        "tiny": dataclasses.replace(_size(5, 192, 6, 6, 512), vocab_size=4096, max_length=1024),
    },
    published={
        "70b": Published(
            total="70B", active="70B", note="grouped-query attention with 8 key and value heads"
        ),
        "deepseek-67b": Published(total="67B", active="67B", note="the baseline of DeepSeek-V2, 2401.02954"),
        "13b": Published(total="13B", active="13B"),
        "7b": Published(total="7B", active="7B", note="dense: every parameter is active"),
    },
    choices=(
        "every token uses every weight: no router, no experts",
        "SwiGLU networks, rotary positions, RMSNorm before each part, no biases",
        "multi-head attention in 7B and 13B, 8 key and value heads in 70B and DeepSeek 67B",
    ),
    equations=(
        "block: h = x + attention(RMSNorm(x)), y = h + FFN(RMSNorm(h))",
        "network: FFN(x) = W_down (silu(W_gate x) * (W_up x))",
    ),
    hugging_face=HuggingFace("llama", "LlamaForCausalLM", LLAMA),
)
