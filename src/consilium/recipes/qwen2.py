"""Qwen2 (2407.10671): dense decoders with biased queries, keys and values; sources of upcycling."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA, Rope
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.recipes.layout import QWEN2
from consilium.recipes.recipe import HuggingFace, Published, Recipe


def _size(layers: int, hidden: int, heads: int, kv_heads: int, width: int) -> Model:
    return Model(
        family="qwen2",
        vocab_size=152064,
        hidden_size=hidden,
        layers=layers,
        attention=GQA(
            heads=heads, kv_heads=kv_heads, head_dim=hidden // heads, qkv_bias=True, rope=Rope(theta=1e6)
        ),
        dense=FeedForward(width=width),
        max_length=32768,
    )


def _tied(layers: int, hidden: int, heads: int, kv_heads: int, width: int) -> Model:
    return dataclasses.replace(_size(layers, hidden, heads, kv_heads, width), vocab_size=151936, tied=True)


RECIPE = Recipe(
    name="qwen2",
    title="Qwen2",
    year=2024,
    paper="2407.10671",
    sizes={
        "72b": dataclasses.replace(_size(80, 8192, 64, 8, 29568), norm_epsilon=1e-5),
        "7b": _size(28, 3584, 28, 4, 18944),
        "1.5b": _tied(28, 1536, 12, 2, 8960),
        "0.5b": _tied(24, 896, 14, 2, 4864),
        "tiny": dataclasses.replace(_size(5, 192, 6, 2, 512), vocab_size=4096, max_length=1024),
    },
    published={
        "72b": Published(total="72.7B", active="72.7B"),
        "7b": Published(total="7.62B", active="7.62B"),
        "1.5b": Published(total="1.54B", active="1.54B", note="embedding and head are one matrix"),
        "0.5b": Published(total="0.49B", active="0.49B", note="embedding and head are one matrix"),
    },
    choices=(
        "every token uses every weight: no router, no experts",
        "grouped-query attention with biases on queries, keys and values; rotary base 1e6",
        "SwiGLU networks, RMSNorm before each part; embedding and head tied in the two small sizes",
    ),
    equations=(
        "block: h = x + attention(RMSNorm(x)), y = h + FFN(RMSNorm(h))",
        "network: FFN(x) = W_down (silu(W_gate x) * (W_up x))",
    ),
    deviations=(
        "lengths are those of the last stage of pre-training; some released configurations allow 131,072",
        "72b norms with an epsilon of 1e-5 (from memory), the other sizes with 1e-6",
    ),
    hugging_face=HuggingFace("qwen2", "Qwen2ForCausalLM", QWEN2),
)
