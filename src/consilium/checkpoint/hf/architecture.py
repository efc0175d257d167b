"""Which published architecture computes exactly what a configuration describes, if any. No torch.

What acts in training only (jitter, learned noise, drops, losses) does not count.
"""

from __future__ import annotations

from typing import Final, Literal

from consilium.config.attention import GQA, MLA, Unscaled
from consilium.config.balance import AdaptiveLoss
from consilium.config.feed_forward import Activation
from consilium.config.model import Model
from consilium.config.moe import AlwaysOn, Capacity, DeviceCapacity, Dropless, MoE, NoShared, SigmoidGated
from consilium.config.router import (
    Groups,
    LearnedNoise,
    LinearGate,
    MLPGate,
    Normalised,
    Raw,
    Router,
    Sigmoid,
    Softmax,
    SoftmaxOfSelected,
    Standardise,
    TopK,
    Weight,
)

Native = Literal[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
]
"""Model types that transformers opens."""
Remote = Literal["deepseek", "grok-1", "skywork_moe", "llama_moe"]
"""Model types that only the code published beside the weights opens."""
Architecture = Native | Remote

LATENT_EPSILON: Final = 1e-6
"""The norms of the latents have this epsilon in DeepSeek's code, whatever the others have."""
_FIXED_THETA: Final = 1e4
"""The rotary base that the code of Grok-1 and LLaMA-MoE has in place of a key."""
_NEGLIGIBLE: Final = 1e-12
_NEGLIGIBLE_VARIANCE: Final = 1e-6


def architecture(config: Model) -> Architecture | None:
    """Return the one whose code opens this model with equal logits."""
    match config.attention:
        case GQA() as gqa:
            return None if config.mtp.depth else _windowed(gqa, _grouped(config, gqa))
        case MLA() as mla:
            return _latent(config, mla) if _usual_trunk(config) else None


def _windowed(gqa: GQA, found: Architecture | None) -> Architecture | None:
    """Of these few have a key for a window, and some of them one for all layers alone."""
    if gqa.window is None:
        return found
    match found:
        case "qwen2" | "qwen3" | "qwen2_moe":
            return found
        case "llama" if not gqa.full_layers:
            return "mistral"
        case "mixtral" | "qwen3_moe" if not gqa.full_layers:
            return found
        case _:
            return None


def _grouped(config: Model, gqa: GQA) -> Architecture | None:
    if gqa.rope.interleaved or gqa.rope.fraction != 1:
        return None
    if config.moe is not None and _grok(config, gqa, config.moe):
        return "grok-1"
    if not _usual_trunk(config) or gqa.softcap or gqa.softmax_scale != gqa.head_dim**-0.5:
        return None
    if config.moe is None:
        return _dense(config, gqa) if _swiglu(config) else None
    if not config.moe_layers or not _swiglu(config) or not _softmax_top_k(config.moe, "swiglu"):
        return None
    if _plain_gate(config.moe) and config.moe.router.scale == 1:
        return _sparse(config, gqa, config.moe)
    return _gated(config, gqa, config.moe)


def _dense(config: Model, gqa: GQA) -> Architecture | None:
    match gqa.qkv_bias, gqa.qk_norm:
        case False, "none":
            return "llama" if config.hidden_size % gqa.heads == 0 else None
        case True, "none":
            return "qwen2"
        case False, "head":
            return "qwen3"
        case _:
            return None


def _sparse(config: Model, gqa: GQA, moe: MoE) -> Architecture | None:
    """Behind a plain linear gate."""
    match gqa.qkv_bias, gqa.qk_norm, moe.shared:
        case _, "none", SigmoidGated():
            return "qwen2_moe"
        case False, "head", NoShared():
            return "qwen3_moe"
        case False, "full", NoShared():
            return "olmoe" if _square(config, gqa) and _everywhere(config) else None
        case False, "none", NoShared() if _everywhere(config) and _sums_to_one(moe.router.weight):
            return "mixtral"
        case False, "none", NoShared() | AlwaysOn():
            fits = moe.shared_width % moe.width == 0 and config.moe_every == 1
            return "deepseek" if fits and _square(config, gqa) and _unscaled(gqa) else None
        case _:
            return None


def _gated(config: Model, gqa: GQA, moe: MoE) -> Architecture | None:
    """Behind a gate with noise, a hidden layer, standardised logits or a factor."""
    router = moe.router
    if not (_everywhere(config) and _square(config, gqa) and _unscaled(gqa)):
        return None
    if gqa.qkv_bias or gqa.qk_norm != "none" or not isinstance(moe.shared, NoShared):
        return None
    match router:
        case Router(
            projection=LinearGate(bias=False), transforms=(Standardise(epsilon=epsilon),), scale=1.0
        ) if epsilon <= _NEGLIGIBLE_VARIANCE and not isinstance(router.noise, LearnedNoise):
            return "skywork_moe" if _sums_to_one(router.weight) else None
        case Router(projection=LinearGate(bias=False) | MLPGate(), transforms=()) if not _adaptive(moe):
            fits = gqa.rope.theta == _FIXED_THETA and _sums_to_one(router.weight)
            return "llama_moe" if fits else None
        case _:
            return None


def _latent(config: Model, mla: MLA) -> Architecture | None:
    if mla.kv_norm != "rms" or mla.qkv_bias or mla.rope.repeats != 1 or not mla.nope_dim:
        return None
    latent = config.norm_epsilon if mla.norm_epsilon is None else mla.norm_epsilon
    if config.moe is None or latent != LATENT_EPSILON or not _deepseek(config, config.moe):
        return None
    if _v2(config.moe.router.served) and not config.mtp.depth and mla.rope.interleaved:
        return "deepseek_v2" if config.hidden_size % mla.heads == 0 else None
    return "deepseek_v3" if _v3(config.moe.router.served) else None


def _usual_trunk(config: Model) -> bool:
    return config.norms == "before" and config.embedding_scale == 1 and config.logit_scale == 1


def _square(config: Model, gqa: GQA) -> bool:
    """Whether heads divide the hidden size among them, as code without a key for their size has it."""
    return gqa.heads * gqa.head_dim == config.hidden_size


def _unscaled(gqa: GQA) -> bool:
    return isinstance(gqa.rope.scaling, Unscaled)


def _everywhere(config: Model) -> bool:
    return all(config.is_moe(i) for i in range(config.layers))


def _swiglu(config: Model) -> bool:
    return config.dense is None or config.dense.activation == "swiglu" or _everywhere(config)


def _served_alike(moe: MoE, activation: Activation) -> bool:
    """Top-k experts of this activation on the hidden size, and none of their tokens dropped when served."""
    match moe.admission:
        case Dropless() | DeviceCapacity():
            dropless = True
        case Capacity(scope=scope):
            dropless = scope == "training"
    return (
        dropless
        and moe.latent is None
        and moe.activation == activation
        and isinstance(moe.router.served.select, TopK)
        and moe.router.weight_on == "output"
    )


def _plain_gate(moe: MoE) -> bool:
    """A linear gate and nothing on its logits, and no balance state that has no name elsewhere."""
    router = moe.router
    linear = router.projection == LinearGate(bias=False) and not isinstance(router.noise, LearnedNoise)
    return linear and not router.transforms and not _adaptive(moe)


def _adaptive(moe: MoE) -> bool:
    return any(isinstance(loss, AdaptiveLoss) for loss in moe.balance.losses)


def _softmax_top_k(moe: MoE, activation: Activation) -> bool:
    match moe.router.served:
        case Router(score=Softmax(), select=TopK(groups=None), offset="none", weight=weight):
            known = isinstance(weight, Raw) or _sums_to_one(weight)
            return known and _served_alike(moe, activation)
        case _:
            return False


def _sums_to_one(weight: Weight) -> bool:
    """For a softmax over all experts the softmax of the selected is the same rule."""
    normalised = isinstance(weight, Normalised) and weight.epsilon < _NEGLIGIBLE
    return normalised or isinstance(weight, SoftmaxOfSelected)


def _grok(config: Model, gqa: GQA, moe: MoE) -> bool:
    return (
        config.norms == "around"
        and gqa.softcap is not None
        and not gqa.qkv_bias
        and gqa.qk_norm == "none"
        and gqa.rope.theta == _FIXED_THETA
        and _unscaled(gqa)
        and _square(config, gqa)
        and _everywhere(config)
        and _softmax_top_k(moe, "geglu")
        and isinstance(moe.router.weight, Raw)
        and _plain_gate(moe)
        and moe.router.scale == 1
        and isinstance(moe.shared, NoShared)
    )


def _deepseek(config: Model, moe: MoE) -> bool:
    return (
        config.moe_every == 1
        and _swiglu(config)
        and _served_alike(moe, "swiglu")
        and _plain_gate(moe)
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
            weight=Raw() | Normalised() as weight,
        ):
            return isinstance(weight, Raw) or _sums_to_one(weight)
        case _:
            return False
