"""Nemotron-4 15B upcycled (2410.07524): squared ReLU experts cut from copies of a dense network."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA, Rope
from consilium.config.balance import Balance, SwitchLoss
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.router import Raw, Router, TopK
from consilium.recipes.recipe import Published, Recipe


def _moe(experts: int, k: int, width: int) -> MoE:
    return MoE(
        experts=experts,
        width=width,
        activation="squared_relu",
        router=Router(select=TopK(k=k), weight=Raw()),
        balance=Balance(losses=(SwitchLoss(coefficient=1e-2),)),
    )


def _size(moe: MoE) -> Model:
    return Model(
        family="nemotron-moe",
        vocab_size=256000,
        hidden_size=6144,
        layers=32,
        attention=GQA(heads=48, kv_heads=8, head_dim=128, rope=Rope(fraction=0.5)),
        moe=moe,
        norm_epsilon=1e-5,
    )


RECIPE = Recipe(
    name="nemotron-moe",
    title="Nemotron-4 15B upcycled",
    year=2024,
    paper="2410.07524",
    sizes={
        "e8g8t8": _size(_moe(64, 8, 3072)),
        "e8g1t2": _size(_moe(8, 2, 24576)),
        "tiny": dataclasses.replace(
            _size(_moe(32, 4, 96)),
            vocab_size=4096,
            hidden_size=192,
            layers=4,
            attention=GQA(heads=6, kv_heads=2, head_dim=32, rope=Rope(fraction=0.5)),
            max_length=1024,
        ),
    },
    published={
        "e8g8t8": Published(total="83B", note="as costly as the dense 15B: 8 slices of an eighth"),
        "e8g1t2": Published(total="83B", note="about 1.6 times as costly as the dense 15B"),
    },
    choices=(
        "ExGyTz: x copies of the dense network, each cut into y slices, z of which a token visits",
        "softmax over all experts before the choice; weights are the scores, not normalised",
        "virtual groups: at the start one router row serves a whole copy, so a token gets one full network",
        "weights are scaled up at the start to make up for small scores",
        "two matrices an expert and squared ReLU; half of each head is rotated",
    ),
    equations=(
        "scores: p = softmax(W x) over the E G experts, S = the T largest",
        "output: y = Σ_{i in S} p_i W_down,i relu(W_up,i x)²",
        "loss, a layer: 0.01 (E/k) Σ_i f_i P_i",
        "scale of both matrices at the start: (E G² / T)^(1/3), so 4 for E8G8T8 and 1.587 for E8G1T2",
    ),
    deviations=(
        "a recipe is the architecture; copies, slices, router rows and scale are made by upcycling",
        "the rotated half, RMSNorm in place of a layer norm, and its epsilon are from memory",
        "an MMLU of 67.6 is often quoted at equal FLOPs; it is E8G1T2's, E8G8T8 has 66.2",
    ),
)
