"""What a GGUF file says of its model, in the keys of Hugging Face's config.json, which one reader knows.

Sources: the key names of the ``gguf`` package and the defaults that llama.cpp takes where a key is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from consilium.checkpoint.hf.read import from_hugging_face
from consilium.config.model import Model
from consilium.errors import ConsiliumError
from consilium.ops.gguf import Header

Keys = Mapping[str, Any]
_GATING: Final = MappingProxyType({1: "softmax", 2: "sigmoid"})
"""``expert_gating_func``; absent in files of DeepSeek-V2, which are all softmax."""
_GROUPS: Final = ("expert_group_count", "expert_group_used_count")
_ATTENTION: Final = tuple(
    f"attention.{key}" for key in ("clamp_kqv", "scale", "temperature_length", "temperature_scale")
)
"""Keys of attention that llama.cpp reads and we do not compute, unless they are 0."""
_WINDOWED: Final = frozenset({"llama"})
"""Architectures whose window is computed. Nothing in a file of Qwen says whether the one there is used."""
_FACTORS: Final = tuple(
    f"rope.scaling.{key}" for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")
)
"""Keys of rotary positions that are not computed here, unless they are 1."""


def model_of(header: Header) -> Model:
    """Return the configuration of the model in a file.

    Raises ConsiliumError for an architecture that is not read here and for what we do not compute.
    """
    general = header.keys.get("general.type", "model")
    if general != "model":
        raise ConsiliumError(f"{header.path} holds a {str(general)[:40]}, not a model; give its model.")
    arch = str(header.keys.get("general.architecture"))
    if arch not in _READERS:
        raise ConsiliumError(
            f"{header.path}: architecture {arch[:40]!r} is not read from GGUF here, which knows"
            f" {', '.join(_READERS)}; give the weights as a Hugging Face folder."
        )
    own = f"{arch}."
    keys = {key.removeprefix(own): value for key, value in header.keys.items() if key.startswith(own)}
    return from_hugging_face(_shared(header, keys) | _READERS[arch](header, keys), header.path)


def _shared(header: Header, keys: Keys) -> dict[str, Any]:
    tensors = header.tensors
    if "token_embd.weight" not in tensors:
        raise ConsiliumError(f"{header.path} has no tensor token_embd.weight; give a whole model.")
    if "rope_freqs.weight" in tensors or "rope_factors_long.weight" in tensors:
        raise _not_computed(header.path, "frequencies of its own for the rotary positions (rope_freqs)")
    if not keys.get("attention.causal", True):
        raise _not_computed(header.path, "attention to later tokens (attention.causal)")
    for key in _ATTENTION:
        if keys.get(key):
            raise _not_computed(header.path, f"{key} {keys[key]}")
    if _window(header, keys) and header.keys.get("general.architecture") not in _WINDOWED:
        raise _not_computed(header.path, f"attention.sliding_window {keys['attention.sliding_window']}")
    return {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": _needed(header, keys, "embedding_length"),
        "num_hidden_layers": _needed(header, keys, "block_count"),
        "intermediate_size": _one(header, keys, "feed_forward_length"),
        "num_attention_heads": _one(header, keys, "attention.head_count"),
        "num_key_value_heads": _one(header, keys, "attention.head_count_kv"),
        "max_position_embeddings": _needed(header, keys, "context_length"),
        "rms_norm_eps": _needed(header, keys, "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_act": "silu",
        "rope_parameters": _rope(header.path, keys),
    }


def _gqa(header: Header, keys: Keys) -> dict[str, Any]:
    """Heads of one width, all of it rotated."""
    heads = _one(header, keys, "attention.head_count") or 1
    width = keys.get("attention.key_length") or _needed(header, keys, "embedding_length") // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, width) != width:
            raise _not_computed(header.path, f"{key} {keys[key]} beside keys of {width}")
    return {"head_dim": width}


def _window(header: Header, keys: Keys) -> dict[str, Any]:
    """A window of every layer, where it is shorter than the context."""
    window, length = keys.get("attention.sliding_window"), _needed(header, keys, "context_length")
    if not window:
        return {}
    if isinstance(window, list) or keys.get("attention.sliding_window_pattern"):
        raise _not_computed(header.path, "layers that differ in their window (attention.sliding_window)")
    longest = type(window) is int and type(length) is int and window >= length
    return {} if longest else {"sliding_window": window}


def _llama(header: Header, keys: Keys) -> dict[str, Any]:
    """Llama and Mistral, Mixtral where there are experts."""
    experts, window = keys.get("expert_count") or 0, _window(header, keys)
    if not experts:
        return _gqa(header, keys) | window | {"model_type": "mistral" if window else "llama"}
    moe = {"num_local_experts": experts, "num_experts_per_tok": _needed(header, keys, "expert_used_count")}
    return _gqa(header, keys) | moe | window | {"model_type": "mixtral"}


def _dense(kind: str) -> Callable[[Header, Keys], dict[str, Any]]:
    return lambda header, keys: _gqa(header, keys) | {"model_type": kind}


def _experts(kind: str, *, normalised: bool) -> Callable[[Header, Keys], dict[str, Any]]:
    """Qwen and OLMoE: experts in every layer. The architecture says whether weights sum to 1."""

    def read(header: Header, keys: Keys) -> dict[str, Any]:
        width = header.tensors.get("blk.0.ffn_gate_exps.weight")
        shared = header.tensors.get("blk.0.ffn_gate_shexp.weight")
        moe = {
            "num_experts": _needed(header, keys, "expert_count"),
            "num_experts_per_tok": _needed(header, keys, "expert_used_count"),
            "norm_topk_prob": normalised,
            "moe_intermediate_size": None if width is None else width.shape[-2],
            "shared_expert_intermediate_size": None if shared is None else shared.shape[-2],
        }
        # What nobody reads where every layer routes is given the width of an expert.
        dense = _one(header, keys, "feed_forward_length") or moe["moe_intermediate_size"]
        if kind == "olmoe":
            dense = moe["moe_intermediate_size"]
        return _gqa(header, keys) | moe | {"model_type": kind, "intermediate_size": dense}

    return read


def _deepseek(header: Header, keys: Keys) -> dict[str, Any]:
    """DeepSeekMoE: softmax, raw weights, shared experts, the first layers dense."""
    if keys.get("expert_weights_scale", 1.0) not in {0.0, 1.0}:
        raise _not_computed(header.path, f"expert_weights_scale {keys['expert_weights_scale']} in deepseek")
    norm = bool(keys.get("expert_weights_norm", False))
    return _gqa(header, keys) | _routed(header, keys) | {"model_type": "deepseek", "norm_topk_prob": norm}


def _deepseek2(header: Header, keys: Keys) -> dict[str, Any]:
    gating = _GATING.get(keys.get("expert_gating_func", 1))
    if gating is None:
        raise _not_computed(header.path, f"expert_gating_func {keys['expert_gating_func']}")
    count, keep = (keys.get(key) or 1 for key in _GROUPS)
    grouped = count > 1
    limited = "group_limited_greedy" if grouped else "greedy"
    return _routed(header, keys) | {
        "model_type": "deepseek_v3" if gating == "sigmoid" else "deepseek_v2",
        "num_key_value_heads": _one(header, keys, "attention.head_count"),
        "q_lora_rank": keys.get("attention.q_lora_rank") or None,
        "kv_lora_rank": _needed(header, keys, "attention.kv_lora_rank"),
        **_latent_heads(header, keys),
        "rope_interleave": True,
        "scoring_func": gating,
        "topk_method": "noaux_tc" if gating == "sigmoid" else limited,
        "n_group": count,
        "topk_group": keep,
        "norm_topk_prob": bool(keys.get("expert_weights_norm", False)),
        "routed_scaling_factor": keys.get("expert_weights_scale") or 1.0,
        "num_nextn_predict_layers": 0,
    }


def _latent_heads(header: Header, keys: Keys) -> dict[str, int]:
    """Widths of a head. Files with absorbed attention name them with ``_mla``, older ones without."""
    rotated = _needed(header, keys, "rope.dimension_count")
    lengths = ("attention.key_length", "attention.value_length")
    key, value = (keys.get(f"{name}_mla") or _needed(header, keys, name) for name in lengths)
    return {"qk_nope_head_dim": key - rotated, "qk_rope_head_dim": rotated, "v_head_dim": value}


def _routed(header: Header, keys: Keys) -> dict[str, Any]:
    return {
        "n_routed_experts": _needed(header, keys, "expert_count"),
        "num_experts_per_tok": _needed(header, keys, "expert_used_count"),
        "moe_intermediate_size": _needed(header, keys, "expert_feed_forward_length"),
        "n_shared_experts": keys.get("expert_shared_count", 0),
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
    }


def _rope(path: Path, keys: Keys) -> dict[str, Any]:
    plain = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 1e4)}
    for key in _FACTORS:
        if keys.get(key, 1) != 1:
            raise _not_computed(path, f"{key} {keys[key]}")
    # Where no type is named, llama.cpp divides positions by the factor, in old files by scale_linear.
    kind = keys.get("rope.scaling.type", "linear")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1))
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return plain
    if kind != "yarn":
        raise _not_computed(path, f"rope.scaling.type {str(kind)[:40]!r} of factor {str(factor)[:40]}")
    # llama.cpp keeps 0.1 times the multiplier, which DeepSeek puts on both sides.
    multiplier = round(10 * keys.get("rope.scaling.yarn_log_multiplier", 0.0), 6)
    both = {"mscale": multiplier, "mscale_all_dim": multiplier} if multiplier else {}
    return plain | both | {
        "rope_type": "yarn",
        "factor": keys.get("rope.scaling.factor"),
        "original_max_position_embeddings": keys.get("rope.scaling.original_context_length"),
        "beta_fast": keys.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.get("rope.scaling.yarn_beta_slow", 1.0),
    }  # fmt: skip


def _needed(header: Header, keys: Keys, key: str) -> Any:
    if keys.get(key) is None:
        raise ConsiliumError(f"{header.path} lacks the key {key}; convert the model again.")
    return keys[key]


def _one(header: Header, keys: Keys, key: str) -> Any:
    """A number that some files give for each layer, where all layers have the same."""
    value = keys.get(key)
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise _not_computed(header.path, f"layers that differ in {key}")
    return value[0]


def _not_computed(path: Path, what: str) -> ConsiliumError:
    return ConsiliumError(f"{path} has {what}, which is not computed here; use a model without it.")


_READERS: Final[Mapping[str, Callable[[Header, Keys], dict[str, Any]]]] = MappingProxyType(
    {
        "llama": _llama,
        "qwen2": _dense("qwen2"),
        "qwen3": _dense("qwen3"),
        "qwen2moe": _experts("qwen2_moe", normalised=False),
        "qwen3moe": _experts("qwen3_moe", normalised=True),
        "olmoe": _experts("olmoe", normalised=False),
        "deepseek": _deepseek,
        "deepseek2": _deepseek2,
    }
)
