"""A configuration in the keys of GGUF, for the architectures of llama.cpp that compute exactly the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, ExpertGatingFuncType, Keys, RopeScalingType

from consilium.checkpoint.hf.architecture import architecture
from consilium.config.attention import GQA, MLA, Attention, Rope, Unscaled, Yarn
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.router import Normalised, Raw, Sigmoid, TopK
from consilium.errors import ConsiliumError

Value = bool | int | float | str
_NAMED: Final[Mapping[str, MODEL_ARCH]] = {
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen2_moe": MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
    "olmoe": MODEL_ARCH.OLMOE,
    "deepseek": MODEL_ARCH.DEEPSEEK,
}
_NORMALISED: Final[Mapping[MODEL_ARCH, bool]] = {
    MODEL_ARCH.QWEN2MOE: False,
    MODEL_ARCH.QWEN3MOE: True,
    MODEL_ARCH.OLMOE: False,
    MODEL_ARCH.DEEPSEEK: False,
}
"""Whether llama.cpp makes the weights of a token's experts sum to 1 there: it has no key for it."""
_EVERYWHERE: Final = frozenset({MODEL_ARCH.QWEN2MOE, MODEL_ARCH.QWEN3MOE, MODEL_ARCH.OLMOE})
_EXPERTS_ALONE: Final = frozenset({MODEL_ARCH.LLAMA, MODEL_ARCH.OLMOE})
"""Where a model has experts it has nothing else, and the one width of a file is theirs."""
_BETAS: Final = (32.0, 1.0)
"""What llama.cpp takes for YaRN's ramp whatever a file says."""
_LITE: Final = (26, 27)
"""Numbers of layers from which llama.cpp concludes that a deepseek2 model has no query compression."""


def arch_of(config: Model) -> MODEL_ARCH:
    """Return the architecture of llama.cpp for ``config``, or raise ConsiliumError naming the obstacle."""
    match architecture(config):
        case "llama" | "mistral" | "mixtral":
            arch = MODEL_ARCH.LLAMA
        case "deepseek_v2" | "deepseek_v3":
            arch = MODEL_ARCH.DEEPSEEK2
        case str() as kind if kind in _NAMED:
            arch = _NAMED[kind]
        case other:
            written = ", ".join(["llama", "mistral", "mixtral", *_NAMED, "deepseek_v2", "deepseek_v3"])
            raise _impossible(
                f"{config.family!r} (architecture {other or 'of our own'}) is none of the architectures"
                f" written here: {written}"
            )
    _check(config, arch)
    return arch


def metadata(config: Model, arch: MODEL_ARCH) -> dict[str, Value]:
    """Return what llama.cpp must know beside the tensors and the tokenizer."""
    keys: dict[str, Value] = {
        Keys.LLM.VOCAB_SIZE: config.vocab_size,
        Keys.LLM.CONTEXT_LENGTH: config.max_length,
        Keys.LLM.EMBEDDING_LENGTH: config.hidden_size,
        Keys.LLM.BLOCK_COUNT: config.layers,
        Keys.LLM.FEED_FORWARD_LENGTH: _width(config, arch),
        Keys.Attention.LAYERNORM_RMS_EPS: config.norm_epsilon,
        **_attention(config.attention),
        **_rope(config.attention.rope, arch),
        **({} if config.moe is None else _moe(config, config.moe, arch)),
    }
    return {key.format(arch=MODEL_ARCH_NAMES[arch]): value for key, value in keys.items()}


def _width(config: Model, arch: MODEL_ARCH) -> int:
    """Of dense networks, or of experts where the file has no other place for it."""
    if config.moe is not None and (config.dense is None or arch in _EXPERTS_ALONE):
        return config.moe.width
    assert config.dense is not None, "a dense layer has a width"
    return config.dense.width


def notices(config: Model) -> tuple[str, ...]:
    """Return one sentence for each thing that a reader of the file does not get or computes differently."""
    found: list[str] = []
    if isinstance(config.attention, GQA) and config.attention.window is not None:
        found.append(
            f"llama.cpp reads no window here: in texts of more than {config.attention.window:,} tokens it"
            " attends to all of them."
        )
    if config.mtp.depth:
        found.append("the modules of multi-token prediction are left out: llama.cpp does not run them.")
    select = None if config.moe is None else config.moe.router.served.select
    if isinstance(select, TopK):
        groups = select.groups
        if groups is not None and groups.score == "max":
            found.append(
                "llama.cpp ranks a group of experts by its two best instead of its best,"
                " so some tokens go to other experts there."
            )
    return tuple(found)


def _attention(attention: Attention) -> dict[str, Value]:
    match attention:
        case GQA() as gqa:
            window: dict[str, Value] = (
                {} if gqa.window is None else {Keys.Attention.SLIDING_WINDOW: gqa.window}
            )
            return window | {
                Keys.Attention.HEAD_COUNT: gqa.heads,
                Keys.Attention.HEAD_COUNT_KV: gqa.kv_heads,
                Keys.Attention.KEY_LENGTH: gqa.head_dim,
                Keys.Attention.VALUE_LENGTH: gqa.head_dim,
                Keys.Rope.DIMENSION_COUNT: gqa.head_dim,
            }
        case MLA() as mla:
            # Absorbed there: one key of latent and rotary part for all heads, whose value is the latent.
            return {
                Keys.Attention.HEAD_COUNT: mla.heads,
                Keys.Attention.HEAD_COUNT_KV: 1,
                Keys.Attention.KEY_LENGTH: mla.kv_rank + mla.rope_dim,
                Keys.Attention.VALUE_LENGTH: mla.kv_rank,
                Keys.Attention.KEY_LENGTH_MLA: mla.nope_dim + mla.rope_dim,
                Keys.Attention.VALUE_LENGTH_MLA: mla.v_dim,
                Keys.Attention.KV_LORA_RANK: mla.kv_rank,
                Keys.Attention.Q_LORA_RANK: mla.q_rank or 0,
                Keys.Rope.DIMENSION_COUNT: mla.rope_dim,
            }


def _rope(rope: Rope, arch: MODEL_ARCH) -> dict[str, Value]:
    keys: dict[str, Value] = {Keys.Rope.FREQ_BASE: rope.theta}
    match rope.scaling:
        case Unscaled():
            return keys
        case Yarn() as yarn:
            keys |= {
                Keys.Rope.SCALING_TYPE: RopeScalingType.YARN.value,
                Keys.Rope.SCALING_FACTOR: yarn.factor,
                Keys.Rope.SCALING_ORIG_CTX_LEN: yarn.original_length,
            }
            if arch is MODEL_ARCH.DEEPSEEK2:
                # Its reader divides by 0.1 again.
                keys[Keys.Rope.SCALING_YARN_LOG_MUL] = 0.1 * yarn.mscale_all_dim
            return keys


def _moe(config: Model, moe: MoE, arch: MODEL_ARCH) -> dict[str, Value]:
    keys: dict[str, Value] = {
        Keys.LLM.EXPERT_COUNT: moe.experts,
        Keys.LLM.EXPERT_USED_COUNT: moe.most_active,
        Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: moe.width,
    }
    match arch:
        case MODEL_ARCH.DEEPSEEK2:
            return keys | _deepseek(config, moe)
        case MODEL_ARCH.DEEPSEEK:
            return keys | _first_dense(config, moe) | {Keys.LLM.EXPERT_WEIGHTS_SCALE: 1.0}
        case MODEL_ARCH.QWEN2MOE:
            return keys | {Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: moe.shared_width}
        case _:
            return keys


def _first_dense(config: Model, moe: MoE) -> dict[str, Value]:
    return {
        Keys.LLM.LEADING_DENSE_BLOCK_COUNT: config.dense_first,
        Keys.LLM.EXPERT_SHARED_COUNT: moe.shared_width // moe.width,
    }


def _deepseek(config: Model, moe: MoE) -> dict[str, Value]:
    router = moe.router.served
    sigmoid = isinstance(router.score, Sigmoid)
    gating = ExpertGatingFuncType.SIGMOID if sigmoid else ExpertGatingFuncType.SOFTMAX
    assert isinstance(router.select, TopK)
    groups = router.select.groups
    return {
        **_first_dense(config, moe),
        Keys.LLM.EXPERT_WEIGHTS_SCALE: router.scale,
        Keys.LLM.EXPERT_WEIGHTS_NORM: isinstance(router.weight, Normalised),
        Keys.LLM.EXPERT_GATING_FUNC: int(gating.value),
        **({} if groups is None else _groups(groups.count, groups.keep)),
    }


def _groups(count: int, keep: int) -> dict[str, Value]:
    return {Keys.LLM.EXPERT_GROUP_COUNT: count, Keys.LLM.EXPERT_GROUP_USED_COUNT: keep}


def _check(config: Model, arch: MODEL_ARCH) -> None:
    """What the architecture cannot say is refused: it would load there and answer something else."""
    scaling = config.attention.rope.scaling
    if isinstance(scaling, Yarn) and (scaling.beta_fast, scaling.beta_slow) != _BETAS:
        raise _impossible(
            f"llama.cpp reads no key for YaRN with beta_fast {scaling.beta_fast:g} and beta_slow"
            f" {scaling.beta_slow:g}, only {_BETAS[0]:g} and {_BETAS[1]:g}"
        )
    if isinstance(scaling, Yarn) and not _yarn_fits(scaling, arch):
        raise _impossible(
            f"it has no key for YaRN with mscale {scaling.mscale:g} and mscale_all_dim"
            f" {scaling.mscale_all_dim:g}"
        )
    match config.attention:
        case MLA(q_rank=int()) if config.layers in _LITE:
            raise _impossible(f"llama.cpp takes one of {config.layers} layers to have no query compression")
        case GQA(qk_norm="full", heads=heads, kv_heads=kv_heads) if kv_heads != heads:
            raise _impossible("llama.cpp norms keys over all heads only where they are as many as queries")
        case GQA(window=int()) if arch is not MODEL_ARCH.LLAMA:
            raise _impossible(f"llama.cpp has no window in a {MODEL_ARCH_NAMES[arch]} (attention.window)")
        case GQA() | MLA():
            pass
    if config.moe is not None and arch in _NORMALISED:
        _check_experts(config, config.moe, arch)
    if config.moe is not None and arch is MODEL_ARCH.DEEPSEEK and not config.moe.shared_width:
        raise _impossible("llama.cpp opens no deepseek without shared experts")


def _check_experts(config: Model, moe: MoE, arch: MODEL_ARCH) -> None:
    name, normalised = MODEL_ARCH_NAMES[arch], _NORMALISED[arch]
    if isinstance(moe.router.weight, Raw) is normalised:
        does = "always normalises" if normalised else "never normalises"
        raise _impossible(f"llama.cpp {does} the weights of a {name} (norm_topk_prob)")
    if arch in _EVERYWHERE and len(config.moe_layers) != config.layers:
        raise _impossible(f"llama.cpp expects experts in every layer of a {name}")


def _yarn_fits(yarn: Yarn, arch: MODEL_ARCH) -> bool:
    """deepseek2 has one number for both multipliers, the others the plain temperature on the rotation."""
    if arch is MODEL_ARCH.DEEPSEEK2:
        return math.isclose(yarn.mscale, yarn.mscale_all_dim) and yarn.mscale != 0
    return yarn.mscale == 1 and yarn.mscale_all_dim == 0


def _impossible(why: str) -> ConsiliumError:
    return ConsiliumError(f"this model cannot be a GGUF file: {why}; convert it --to hf instead.")
