"""OLMoE-1B-7B (2409.02060): 8 of 64 small experts in every layer, weights as they are, no shared expert."""

from __future__ import annotations

from consilium.config.attention import GQA
from consilium.config.balance import Balance, SwitchLoss, ZLoss
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.router import Raw, Router, TopK
from consilium.recipes.layout import OLMOE
from consilium.recipes.recipe import HuggingFace, Published, Recipe

_BALANCE = Balance(losses=(SwitchLoss(coefficient=1e-2), ZLoss(coefficient=1e-3)))

_7B = Model(
    family="olmoe",
    vocab_size=50304,
    hidden_size=2048,
    layers=16,
    attention=GQA(heads=16, kv_heads=16, head_dim=128, qk_norm="full"),
    moe=MoE(experts=64, width=1024, router=Router(select=TopK(k=8), weight=Raw()), balance=_BALANCE),
    norm_epsilon=1e-5,
)

_TINY = Model(
    family="olmoe",
    vocab_size=4096,
    hidden_size=192,
    layers=4,
    attention=GQA(heads=6, kv_heads=6, head_dim=32, qk_norm="full"),
    moe=MoE(experts=32, width=64, router=Router(select=TopK(k=4), weight=Raw()), balance=_BALANCE),
    norm_epsilon=1e-5,
    max_length=1024,
)

RECIPE = Recipe(
    name="olmoe",
    title="OLMoE",
    year=2024,
    paper="2409.02060",
    sizes={"7b": _7B, "tiny": _TINY},
    published={"7b": Published(total="6.9B", active="1.3B")},
    choices=(
        "8 of 64 experts of width 1024 in every layer, no shared expert, no token dropped",
        "softmax over all experts; the weights are the 8 probabilities themselves and sum to less than 1",
        "a load-balance loss of 0.01 beside a router z-loss of 0.001",
        "queries and keys are normed over their full width, before they are split into heads",
    ),
    equations=(
        "scores: p = softmax(W x) over the E experts, S = the k largest",
        "output: y = Σ_{i in S} p_i SwiGLU_i(x)",
        "load-balance loss, a layer: 0.01 (E/k) Σ_i f_i P_i",
        "z-loss, a layer: 0.001 times the mean over tokens of (log Σ_j exp (W x)_j)²",
    ),
    deviations=(
        "the loss is 0.01 a layer at balance; transformers pools all layers and has k times that",
        "the training code of the release divides its losses differently; the coefficients are the paper's",
    ),
    hugging_face=HuggingFace("olmoe", "OlmoeForCausalLM", OLMOE),
)
