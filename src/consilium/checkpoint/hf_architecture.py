"""Which architecture of transformers computes exactly what a configuration describes, if any. No torch."""

from __future__ import annotations

from typing import Literal

from consilium.config.attention import GQA, MLA
from consilium.config.balance import AdaptiveLoss
from consilium.config.model import Model
from consilium.config.moe import AlwaysOn, Capacity, DeviceCapacity, Dropless, MoE, NoShared
from consilium.config.router import (
    Groups,
    LearnedNoise,
    LinearGate,
    Normalised,
    Raw,
    Router,
    Sigmoid,
    Softmax,
    SoftmaxOfSelected,
    TopK,
)

Architecture = Literal["llama", "mixtral", "deepseek_v2", "deepseek_v3"]

_DEEPSEEK_LATENT_EPSILON = 1e-6
"""The norms of the latents have this epsilon in DeepSeek's code, whatever the others have."""
_NEGLIGIBLE = 1e-12


def architecture(config: Model) -> Architecture | None:
    """Return the one that opens this model with equal logits.

    What acts in training only (jitter, drops, losses) does not count.
    """
    match config.attention:
        case GQA() as gqa:
            if not _plain(gqa) or config.mtp.depth:
                return None
            if config.moe is None:
                return "llama" if _swiglu(config) and config.hidden_size % gqa.heads == 0 else None
            return (
                "mixtral"
                if config.dense_first == 0 and config.moe_every == 1 and _mixtral(config.moe)
                else None
            )
        case MLA() as mla:
            if config.moe is None or not _deepseek(config, config.moe):
                return None
            if _v2(config.moe.router) and not config.mtp.depth and mla.rope.interleaved:
                return "deepseek_v2" if config.hidden_size % mla.heads == 0 else None
            return "deepseek_v3" if _v3(config.moe.router) else None


def _plain(gqa: GQA) -> bool:
    scaled = gqa.scale is not None and gqa.scale != gqa.head_dim**-0.5
    return not (gqa.qkv_bias or gqa.qk_norm != "none" or gqa.softcap or gqa.rope.interleaved or scaled)


def _swiglu(config: Model) -> bool:
    return config.dense is None or config.dense.activation == "swiglu"


def _common(moe: MoE) -> bool:
    """A linear gate, top-k, SwiGLU experts, and no balance state that transformers lacks a name for."""
    router = moe.router
    return (
        router.projection == LinearGate(bias=False)
        and not isinstance(router.noise, LearnedNoise)
        and not router.transforms
        and isinstance(router.select, TopK)
        and router.weight_on == "output"
        and moe.activation == "swiglu"
        and _dropless_when_served(moe)
        and not any(isinstance(loss, AdaptiveLoss) for loss in moe.balance.losses)
    )


def _dropless_when_served(moe: MoE) -> bool:
    match moe.admission:
        case Dropless() | DeviceCapacity():
            return True
        case Capacity(scope=scope):
            return scope == "training"


def _mixtral(moe: MoE) -> bool:
    match moe.router:
        case Router(score=Softmax(), select=TopK(groups=None), offset="none", scale=1.0, weight=weight):
            normalised = isinstance(weight, Normalised) and weight.epsilon < _NEGLIGIBLE
            one_sum = normalised or isinstance(weight, SoftmaxOfSelected)
            return one_sum and _common(moe) and isinstance(moe.shared, NoShared)
        case _:
            return False


def _deepseek(config: Model, moe: MoE) -> bool:
    return (
        config.moe_every == 1
        and config.dense_first < config.layers
        and config.norm_epsilon == _DEEPSEEK_LATENT_EPSILON
        and _swiglu(config)
        and _common(moe)
        and isinstance(moe.shared, AlwaysOn)
        and moe.shared_width % moe.width == 0
    )


def _v2(router: Router) -> bool:
    match router:
        case Router(
            score=Softmax(), offset="none", weight=Raw(), select=TopK(groups=None | Groups(score="max"))
        ):
            return True
        case _:
            return False


def _v3(router: Router) -> bool:
    match router:
        case Router(
            score=Sigmoid(),
            offset="scores",
            select=TopK(groups=None | Groups(score="top2_sum")),
            weight=weight,
        ):
            return isinstance(weight, Raw) or (
                isinstance(weight, Normalised) and weight.epsilon < _NEGLIGIBLE
            )
        case _:
            return False
