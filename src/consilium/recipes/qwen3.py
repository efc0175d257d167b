"""Qwen3 (2505.09388), dense: queries and keys normed in each head; sources of upcycling."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA, Rope
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.recipes.layout import QWEN3
from consilium.recipes.recipe import HuggingFace, Published, Recipe


def _attention(heads: int, kv_heads: int = 8, head_dim: int = 128) -> GQA:
    return GQA(heads=heads, kv_heads=kv_heads, head_dim=head_dim, qk_norm="head", rope=Rope(theta=1e6))


def _size(layers: int, hidden: int, attention: GQA, width: int, *, tied: bool = False) -> Model:
    return Model(
        family="qwen3",
        vocab_size=151936,
        hidden_size=hidden,
        layers=layers,
        attention=attention,
        dense=FeedForward(width=width),
        tied=tied,
        max_length=40960,
    )


_TIED = "embedding and head are one matrix"

RECIPE = Recipe(
    name="qwen3",
    title="Qwen3",
    year=2025,
    paper="2505.09388",
    sizes={
        "32b": _size(64, 5120, _attention(64), 25600),
        "14b": _size(40, 5120, _attention(40), 17408),
        "8b": _size(36, 4096, _attention(32), 12288),
        "4b": _size(36, 2560, _attention(32), 9728, tied=True),
        "1.7b": _size(28, 2048, _attention(16), 6144, tied=True),
        "0.6b": _size(28, 1024, _attention(16), 3072, tied=True),
        "tiny": dataclasses.replace(
            _size(5, 192, _attention(6, 2, 32), 512), vocab_size=4096, max_length=1024
        ),
    },
    published={
        "32b": Published(total="32.8B", active="32.8B"),
        "14b": Published(total="14.8B", active="14.8B"),
        "8b": Published(total="8.2B", active="8.2B"),
        "4b": Published(total="4.0B", active="4.0B", note=_TIED),
        "1.7b": Published(total="1.7B", active="1.7B", note=_TIED),
        "0.6b": Published(total="0.6B", active="0.6B", note=_TIED),
    },
    choices=(
        "every token uses every weight: no router, no experts",
        "each head's queries and keys are normed before the rotation; no biases; rotary base 1e6",
        "8 key and value heads and heads of 128 at any width, so heads times 128 need not be the hidden size",
        "SwiGLU networks, RMSNorm before each part; embedding and head tied up to 4B",
    ),
    equations=(
        "attention: q = RoPE(RMSNorm_head(W_q x)), k = RoPE(RMSNorm_head(W_k x))",
        "block: h = x + attention(RMSNorm(x)), y = h + FFN(RMSNorm(h))",
        "network: FFN(x) = W_down (silu(W_gate x) * (W_up x))",
    ),
    deviations=("dimensions of the dense sizes are from memory; their totals agree with the published ones",),
    hugging_face=HuggingFace("qwen3", "Qwen3ForCausalLM", QWEN3),
)
