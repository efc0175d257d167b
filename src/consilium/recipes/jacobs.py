"""Adaptive mixtures of local experts (Jacobs, Jordan, Nowlan, Hinton 1991), as the blocks of a decoder."""

from __future__ import annotations

from consilium.config.attention import GQA
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.router import LinearGate, Raw, Router, TopK
from consilium.recipes.recipe import Recipe

_TINY = Model(
    family="jacobs",
    vocab_size=4096,
    hidden_size=192,
    layers=4,
    attention=GQA(heads=6, kv_heads=6, head_dim=32),
    moe=MoE(
        experts=8,
        width=128,
        activation="relu",
        router=Router(projection=LinearGate(bias=True), select=TopK(k=8), weight=Raw()),
    ),
    max_length=1024,
)

RECIPE = Recipe(
    name="jacobs",
    title="Adaptive mixtures of local experts",
    year=1991,
    paper="Neural Computation 3(1):79-87",
    sizes={"tiny": _TINY},
    published={},
    choices=(
        "a gating network with biases reads the same input as the experts; its softmax blends all of them",
        "no expert is ever skipped, so nothing has to be balanced and gradients reach every expert",
        "the paper's point is the error function: competition makes each expert local to a part of the input",
    ),
    equations=(
        "gate: p = softmax(W x + b)",
        "blend, the form of this decoder: y = Σ_i p_i FFN_i(x)",
        "cooperative error: E = ‖d - Σ_i p_i o_i‖², gradient of o_i: -2 p_i (d - Σ_j p_j o_j)",
        "competitive error: E = Σ_i p_i ‖d - o_i‖², gradient of o_i: -2 p_i (d - o_i)",
        "error of the paper: E = -log Σ_i p_i exp(-½ ‖d - o_i‖²), gradient of o_i: -h_i (d - o_i)",
        "responsibility: h_i = p_i exp(-½ ‖d - o_i‖²) / Σ_j p_j exp(-½ ‖d - o_j‖²); gate gradient: p - h",
    ),
    deviations=(
        "a decoder can only train on the blend, the cooperative form: its target is a token far above",
        "the paper's own mixture and its three errors: consilium.moe.adaptive_mixture.AdaptiveMixture",
        "the paper's experts are linear or one-layer networks, here ReLU networks inside a decoder",
        "the formulas are taken from lecture notes and memory, not from the printed article",
    ),
)
