"""The dense mixture of experts (Eigen, Ranzato, Sutskever 2013, 1312.4314): every expert sees every token."""

from __future__ import annotations

from consilium.config.attention import GQA
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.router import Raw, Router, TopK
from consilium.recipes.recipe import Recipe

_TINY = Model(
    family="dense-moe",
    vocab_size=4096,
    hidden_size=192,
    layers=4,
    attention=GQA(heads=6, kv_heads=6, head_dim=32),
    moe=MoE(experts=8, width=128, router=Router(select=TopK(k=8), weight=Raw())),
    max_length=1024,
)

RECIPE = Recipe(
    name="dense-moe",
    title="Dense mixture of experts",
    year=2013,
    paper="1312.4314",
    sizes={"tiny": _TINY},
    published={},
    choices=(
        "mixtures stacked as layers of one deep network, each with a gate of its own",
        "all experts run on all tokens: the arithmetic of a network as wide as all of them together",
        "differentiable everywhere, so no loss has to keep experts alive and nothing is dropped",
        "the oracle of sparse layers: top-k with k = E and no capacity has to equal it",
    ),
    equations=(
        "gate: p = softmax(W x)",
        "output: y = Σ_i p_i FFN_i(x), i over all E experts",
    ),
    deviations=(
        "the paper's networks classify images and phonemes; here the layer stands in a decoder",
        "the paper bounds each expert's sum of weights early in training (from memory); here nothing does",
    ),
)
