"""Llama 2 (2307.09288): the dense decoder that every sparse one is measured against."""

from __future__ import annotations

from consilium.config.attention import GQA
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.recipes.recipe import HuggingFace, Published, Recipe

_7B = Model(
    family="llama",
    vocab_size=32000,
    hidden_size=4096,
    layers=32,
    attention=GQA(heads=32, kv_heads=32, head_dim=128),
    dense=FeedForward(width=11008),
    norm_epsilon=1e-5,
    max_length=4096,
)

_TINY = Model(
    family="llama",
    vocab_size=4096,
    hidden_size=192,
    layers=5,
    attention=GQA(heads=6, kv_heads=6, head_dim=32),
    dense=FeedForward(width=512),
    norm_epsilon=1e-5,
    max_length=1024,
)

RECIPE = Recipe(
    name="llama",
    title="Llama 2",
    year=2023,
    paper="2307.09288",
    sizes={"7b": _7B, "tiny": _TINY},
    published={"7b": Published(total="7B", active="7B", note="dense: every parameter is active")},
    choices=(
        "every token uses every weight: no router, no experts",
        "SwiGLU networks of width 11008, multi-head attention, rotary positions, RMSNorm before each part",
    ),
    hugging_face=HuggingFace(model_type="llama", architecture="LlamaForCausalLM"),
)
