"""LLaMA-MoE (2406.16554): Llama 2 7B with its feed-forward networks cut into experts."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA
from consilium.config.balance import Balance, ImportanceLoss, LoadLoss
from consilium.config.model import Model
from consilium.config.moe import AlwaysOn, MoE
from consilium.config.router import LearnedNoise, MLPGate, Router, SoftmaxOfSelected, TopK
from consilium.recipes.layout_remote import LLAMA_MOE
from consilium.recipes.recipe import HuggingFace, Published, Recipe


def _moe(experts: int, k: int, width: int) -> MoE:
    """Weights sum to 1, and times E/k the output is as large as that of the whole network."""
    return MoE(
        experts=experts,
        width=width,
        router=Router(
            projection=MLPGate(),
            noise=LearnedNoise(floor=1e-2),
            select=TopK(k=k),
            weight=SoftmaxOfSelected(),
            scale=experts / k,
        ),
        balance=Balance(losses=(ImportanceLoss(coefficient=1e-2), LoadLoss(coefficient=1e-2))),
    )


def _size(moe: MoE) -> Model:
    return Model(
        family="llama-moe",
        vocab_size=32000,
        hidden_size=4096,
        layers=32,
        attention=GQA(heads=32, kv_heads=32, head_dim=128),
        moe=moe,
        norm_epsilon=1e-5,
        max_length=4096,
    )


RECIPE = Recipe(
    name="llama-moe",
    title="LLaMA-MoE",
    year=2024,
    paper="2406.16554",
    sizes={
        "3.5b-4-16": _size(_moe(16, 4, 688)),
        "3.0b-2-16": _size(_moe(16, 2, 688)),
        "3.5b-2-14-residual": _size(
            dataclasses.replace(_moe(14, 2, 688), shared=AlwaysOn(count=2, width=688))
        ),
        "3.5b-2-8": _size(_moe(8, 2, 1376)),
        "tiny": dataclasses.replace(
            _size(_moe(8, 2, 128)),
            vocab_size=4096,
            hidden_size=192,
            layers=4,
            attention=GQA(heads=6, kv_heads=6, head_dim=32),
            max_length=1024,
        ),
    },
    published={
        "3.5b-4-16": Published(total="6.7B", active="3.5B"),
        "3.0b-2-16": Published(total="6.7B", active="3.0B"),
        "3.5b-2-8": Published(total="6.7B", active="3.5B"),
    },
    choices=(
        "the 11,008 hidden neurons of each network are dealt to 16 experts of 688 or 8 of 1,376",
        "a gate of two layers with tanh between, E columns each; learned noise in training, at least 0.01",
        "softmax over the kept, times E/k, so that the output is as large as the dense network's",
        "importance and load losses of 0.01 each; no capacity",
        "residual size: two slices are always on and 2 of the other 14 are routed",
    ),
    equations=(
        "logits: z = tanh(x W_1) W_2, noisy: H = z + N(0, 1) (softplus(x W_noise) + 0.01)",
        "weights: g = (E/k) softmax over the k largest of H",
        "output: y = Σ_{i in S} g_i SwiGLU_i(x), residual size: + SwiGLU_always(x)",
        "importance loss: 0.01 CV(Σ_x g)², load loss: 0.01 CV(Σ_x chance of each expert)²",
    ),
    deviations=(
        "the released code divides variances by E - 1, the losses here by E as Shazeer et al. do",
        "the released load estimate compares noise, not noisy logits, with the threshold: not followed here",
        "the residual size was studied, not released; its scale 14/2 follows the rule of the others",
        "the random split, best in the paper, is a way to make the weights, not part of the configuration",
    ),
    hugging_face=HuggingFace("llama_moe", "LlamaMoEForCausalLM", LLAMA_MOE),
)
