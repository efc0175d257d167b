"""Mixtral (2401.04088): eight large experts, top-2, weights normalised over the two, no token dropped."""

from __future__ import annotations

from consilium.config.attention import GQA, Rope
from consilium.config.balance import Balance, SwitchLoss
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.router import Router, TopK
from consilium.recipes.recipe import HuggingFace, Published, Recipe

_ROPE = Rope(theta=1e6)
_ROUTER = Router(select=TopK(k=2))
_BALANCE = Balance(losses=(SwitchLoss(coefficient=0.02),))

_8X22B = Model(
    family="mixtral",
    vocab_size=32000,
    hidden_size=6144,
    layers=56,
    attention=GQA(heads=48, kv_heads=8, head_dim=128, rope=_ROPE),
    moe=MoE(experts=8, width=16384, router=_ROUTER, balance=_BALANCE),
    norm_epsilon=1e-5,
    max_length=65536,
)

_8X7B = Model(
    family="mixtral",
    vocab_size=32000,
    hidden_size=4096,
    layers=32,
    attention=GQA(heads=32, kv_heads=8, head_dim=128, rope=_ROPE),
    moe=MoE(experts=8, width=14336, router=_ROUTER, balance=_BALANCE),
    norm_epsilon=1e-5,
    max_length=32768,
)

_TINY = Model(
    family="mixtral",
    vocab_size=4096,
    hidden_size=192,
    layers=4,
    attention=GQA(heads=6, kv_heads=2, head_dim=32, rope=_ROPE),
    moe=MoE(experts=8, width=256, router=_ROUTER, balance=_BALANCE),
    norm_epsilon=1e-5,
    max_length=1024,
)

RECIPE = Recipe(
    name="mixtral",
    title="Mixtral of Experts",
    year=2024,
    paper="2401.04088",
    sizes={"8x22b": _8X22B, "8x7b": _8X7B, "tiny": _TINY},
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
    deviations=(
        "the loss is a layer's own, 0.02 at balance; transformers pools all layers and has k times that",
    ),
    hugging_face=HuggingFace(model_type="mixtral", architecture="MixtralForCausalLM"),
)
