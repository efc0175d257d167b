"""DeepSeekMoE (2401.06066): fine-grained experts beside shared ones, weights as they are."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA
from consilium.config.balance import Balance, BalanceLoss, DeviceLoss, SwitchLoss
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model, Normal
from consilium.config.moe import AlwaysOn, MoE
from consilium.config.router import Raw, Router, TopK
from consilium.recipes.layout import DEEPSEEK
from consilium.recipes.recipe import HuggingFace, Published, Recipe

_LARGE: tuple[BalanceLoss, ...] = (SwitchLoss(coefficient=0.003), DeviceLoss(coefficient=0.05, devices=4))


def _moe(shared: int, experts: int, k: int, width: int, losses: tuple[BalanceLoss, ...]) -> MoE:
    return MoE(
        experts=experts,
        width=width,
        router=Router(select=TopK(k=k), weight=Raw()),
        balance=Balance(losses=losses),
        shared=AlwaysOn(count=shared, width=width),
    )


def _size(layers: int, hidden: int, heads: int, dense: FeedForward | None, moe: MoE) -> Model:
    return Model(
        family="deepseek-moe",
        vocab_size=102400,
        hidden_size=hidden,
        layers=layers,
        attention=GQA(heads=heads, kv_heads=heads, head_dim=hidden // heads),
        dense=dense,
        dense_first=0 if dense is None else 1,
        moe=moe,
        init=Normal(std=0.006),
    )


_2B = dataclasses.replace(
    _size(9, 1280, 10, None, _moe(1, 63, 7, 853, (SwitchLoss(coefficient=0.01),))),
    vocab_size=8000,
    max_length=2048,
)
_TINY = dataclasses.replace(
    _size(5, 192, 6, FeedForward(width=512), _moe(2, 32, 4, 64, _LARGE)),
    vocab_size=4096,
    max_length=1024,
    init=Normal(),
)

RECIPE = Recipe(
    name="deepseek-moe",
    title="DeepSeekMoE",
    year=2024,
    paper="2401.06066",
    sizes={
        "145b": _size(62, 4096, 32, FeedForward(width=22528), _moe(4, 128, 12, 1408, _LARGE)),
        "142b": _size(62, 4096, 32, FeedForward(width=11264), _moe(2, 128, 6, 1408, _LARGE)),
        "16b": _size(
            28, 2048, 16, FeedForward(width=10944), _moe(2, 64, 6, 1408, (SwitchLoss(coefficient=0.001),))
        ),
        "2b": _2B,
        "tiny": _TINY,
    },
    published={
        "145b": Published(total="144.6B", active="22.2B"),
        "142b": Published(
            total="142.3B", active="12.2B", note="half as many active; its FLOPs say 13.6B active, not 12.2B"
        ),
        "16b": Published(total="16.4B", active="2.8B"),
        "2b": Published(total="2.0B", active="0.3B", note="the validation model, with a vocabulary of 8K"),
    },
    choices=(
        "experts of a quarter (145b: an eighth) of a network's width, and as many times more of them active",
        "shared experts see every token and keep what all need; the routed ones specialise",
        "weights are the softmax scores themselves, never normalised",
        "an expert-level loss, and for 145b and 142b a loss over 4 devices' experts; no token is dropped",
        "the first layer is dense (not in 2b): its balance is slow to come",
    ),
    equations=(
        "scores: s = softmax(u e_i) over the routed experts (eq. 11)",
        "weights: g_i = s_i for the k largest, else 0 (eq. 10)",
        "output: h = u + Σ_shared FFN(u) + Σ_{i in S} g_i FFN_i(u) (eq. 9)",
        "expert loss: α1 Σ_i f_i P_i, f_i = (E/kT) · tokens that chose i, P_i = mean s_i (eq. 12-14)",
        "device loss: α2 Σ_d f'_d P'_d, f' mean of f and P' sum of P over a device's experts (eq. 15-17)",
    ),
    deviations=(
        "the released configuration of 16b wants its loss in each sequence; paper and recipe: over the batch",
        "the dense layers of 145b (22,528) and 142b (11,264) and 2b's experts (853) are inferred from totals",
        "16b is not V2-Lite, also called 16B: 28 layers of multi-head attention, not 27 of latent attention",
        "whether 145b dropped tokens is not stated; it drops none here",
    ),
    hugging_face=HuggingFace("deepseek", "DeepseekForCausalLM", DEEPSEEK),
)
