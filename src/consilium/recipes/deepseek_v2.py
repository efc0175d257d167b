"""DeepSeek-V2 and V2-Lite (2405.04434): latent attention, device-limited routing, three balance losses."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import MLA, Rope, Yarn
from consilium.config.balance import Balance, CommunicationLoss, DeviceLoss, SequenceLoss
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model, Normal
from consilium.config.moe import AlwaysOn, DeviceCapacity, MoE
from consilium.config.router import Groups, Raw, Router, TopK
from consilium.recipes.layout import DEEPSEEK_V2
from consilium.recipes.recipe import HuggingFace, Published, Recipe

_YARN = Yarn(factor=40.0, original_length=4096, mscale=0.707, mscale_all_dim=0.707)
_ROPE = Rope(interleaved=True, scaling=_YARN)
_BALANCE = Balance(
    losses=(
        SequenceLoss(coefficient=0.003),
        DeviceLoss(coefficient=0.05, devices=8, scope="sequence"),
        CommunicationLoss(coefficient=0.02, devices=8, most=3, scope="sequence"),
    )
)


def _moe(experts: int, width: int, k: int, scale: float) -> MoE:
    selected = TopK(k=k, groups=Groups(count=8, keep=3, score="max"))
    return MoE(
        experts=experts,
        width=width,
        router=Router(select=selected, weight=Raw(), scale=scale),
        admission=DeviceCapacity(devices=8, factor=1.0, exempt=0.1),
        balance=_BALANCE,
        shared=AlwaysOn(count=2, width=width),
    )


def _size(layers: int, hidden: int, heads: int, q_rank: int | None, dense: int, moe: MoE) -> Model:
    latent = MLA(heads=heads, q_rank=q_rank, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128, rope=_ROPE)
    return Model(
        family="deepseek-v2",
        vocab_size=102400,
        hidden_size=hidden,
        layers=layers,
        attention=latent,
        dense=FeedForward(width=dense),
        dense_first=1,
        moe=moe,
        max_length=163840,
        init=Normal(std=0.006),
    )


_236B = _size(60, 5120, 128, 1536, 12288, _moe(160, 1536, 6, 16.0))

_LITE_MOE = MoE(
    experts=64,
    width=1408,
    router=Router(select=TopK(k=6), weight=Raw()),
    balance=Balance(losses=(SequenceLoss(coefficient=0.001),)),
    shared=AlwaysOn(count=2, width=1408),
)

_TINY = Model(
    family="deepseek-v2",
    vocab_size=4096,
    hidden_size=192,
    layers=5,
    attention=MLA(heads=6, q_rank=96, kv_rank=64, nope_dim=32, rope_dim=16, v_dim=32),
    dense=FeedForward(width=512),
    dense_first=1,
    moe=_moe(32, 64, 4, 4.0),
    max_length=1024,
)

RECIPE = Recipe(
    name="deepseek-v2",
    title="DeepSeek-V2",
    year=2024,
    paper="2405.04434",
    sizes={
        "236b": _236B,
        "236b-paper": dataclasses.replace(_236B, moe=_moe(160, 1536, 6, 1.0)),
        "lite": _size(27, 2048, 16, None, 10944, _LITE_MOE),
        "tiny": _TINY,
    },
    published={
        "236b": Published(total="236B", active="21B"),
        "lite": Published(total="15.7B", active="2.4B", note="active leaves the input embedding out"),
    },
    choices=(
        "multi-head latent attention: keys and values live in 512 shared values and a 64-value rotary key",
        "softmax over 160 experts; the 6 best within the 3 of 8 devices of highest maximum",
        "weights are the scores themselves, never normalised, times 16 (Lite: plain top-6 of 64, times 1)",
        "expert, device and communication losses, each over single sequences (Lite: the first alone)",
        "in training a device keeps at most its fair share, best scores first; 10% of sequences are exempt",
        "2 shared experts; the first layer is dense; YaRN reaches 128K tokens",
    ),
    equations=(
        "scores: s = softmax(u e_i); S = the 6 best in the 3 of 8 devices of highest maximum (eq. 20-22)",
        "output: h = u + Σ_shared FFN(u) + 16 Σ_{i in S} s_i FFN_i(u)",
        "expert loss: 0.003 Σ_i f_i P_i over a sequence of T, f_i = E/(k T) tokens that chose i (eq. 23-25)",
        "device loss: 0.05 Σ_d f'_d P'_d, f' mean of f, P' sum of P over a device's experts (eq. 26-28)",
        "communication loss: 0.02 Σ_d f''_d P'_d, f''_d = D/(M T) tokens sent to device d (eq. 29-31)",
        "attention: c = RMSNorm(W_DKV h), k = [W_UK c; RoPE(W_KR h)], v = W_UV c (eq. 9-19)",
    ),
    deviations=(
        "the factor 16 is in the released configuration, not in the paper's equations; size 236b-paper has 1",
        "the released configuration says 0.001 for the sequence loss; the paper, and this recipe, 0.003",
        "articles say 16 experts, choose 2: 16 is the factor, and there are 160 experts, 6 of them active",
        "articles say latent attention picks the heads that matter: every head of every token runs",
        "the configuration of the inference code beside DeepSeek-V3 forgets mscale, 0.707 in the release",
        "the paper's scaling factors at the width bottlenecks are unspecified; released code has norms only",
    ),
    hugging_face=HuggingFace("deepseek_v2", "DeepseekV2ForCausalLM", DEEPSEEK_V2),
)
