"""Attention and rotary positions in the keys of Hugging Face, both ways. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from consilium.checkpoint.hf.architecture import LATENT_EPSILON
from consilium.checkpoint.hf.keys import Keys
from consilium.config.attention import GQA, MLA, Attention, Rope, Unscaled, Yarn

_ROPE: Final[Mapping[str, Any]] = {
    "rope_type": None,
    "type": None,
    "rope_theta": None,
    "partial_rotary_factor": 1.0,
    "factor": None,
    "original_max_position_embeddings": None,
    "beta_fast": None,
    "beta_slow": None,
    "mscale": None,
    "mscale_all_dim": None,
    "attention_factor": None,
    "truncate": True,
}


def read_gqa(keys: Keys, **choices: object) -> dict[str, Any]:
    """Grouped-query attention as plain data; heads share the hidden size where ``head_dim`` is null."""
    heads = keys.number("num_attention_heads")
    kv_heads = keys.number_or("num_key_value_heads", heads)
    if heads % kv_heads:
        raise keys.wrong("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    head_dim = keys.number_or("head_dim", keys.number("hidden_size") // heads)
    if head_dim % 2 or not head_dim:
        raise keys.wrong("hidden_size" if keys["head_dim"] is None else "head_dim", "even for each head")
    plain = {"kind": "gqa", "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return {**plain, "rope": _read_rope(keys), **choices}


def read_mla(keys: Keys, *, interleaved: bool) -> dict[str, Any]:
    """Latent attention as plain data; a null ``q_lora_rank`` compresses no queries."""
    rank = None if keys["q_lora_rank"] is None else keys.number("q_lora_rank")
    if keys.number("qk_rope_head_dim") % 2:
        raise keys.wrong("qk_rope_head_dim", "even")
    own = {} if keys.real("rms_norm_eps") == LATENT_EPSILON else {"norm_epsilon": LATENT_EPSILON}
    return {
        "kind": "mla",
        "heads": keys.number("num_attention_heads"),
        "q_rank": rank,
        "kv_rank": keys.number("kv_lora_rank"),
        "nope_dim": keys.number("qk_nope_head_dim"),
        "rope_dim": keys.number("qk_rope_head_dim"),
        "v_dim": keys.number("v_head_dim"),
        "rope": _read_rope(keys) | {"interleaved": interleaved},
        **own,
    }


def _read_rope(keys: Keys) -> dict[str, Any]:
    """Rotary positions in both spellings; as in transformers, ``rope_scaling`` replaces the other whole."""
    name = "rope_scaling" if keys["rope_scaling"] else "rope_parameters"
    given = keys[name] or {}
    nested = isinstance(given, dict) and any(isinstance(value, dict | list) for value in given.values())
    if not isinstance(given, dict) or nested:
        raise keys.unsupported(name)
    found = Keys(keys.path, {**_ROPE, **given})
    if found["partial_rotary_factor"] != 1:
        raise found.unsupported("partial_rotary_factor")
    theta = found if "rope_theta" in given else keys
    plain = {"theta": theta.real("rope_theta")}
    match found["rope_type"] or found["type"] or "default":
        case "default":
            return plain
        case "yarn":
            return plain | {"scaling": _read_yarn(keys, found)}
        case kind:
            raise keys.unsupported(name, kind)


def _read_yarn(keys: Keys, found: Keys) -> dict[str, Any]:
    """The length before scaling may stand outside, and is else the present one."""
    if found["truncate"] is not True:
        raise found.unsupported("truncate")
    outside = keys["original_max_position_embeddings"] is not None
    length = (keys if outside else found).number_or(
        "original_max_position_embeddings", keys.number("max_position_embeddings")
    )
    return {
        "kind": "yarn",
        "factor": found.real("factor"),
        "original_length": length,
        "beta_fast": found.coefficient("beta_fast") or 32.0,
        "beta_slow": found.coefficient("beta_slow") or 1.0,
        **_read_multipliers(found),
    }


def _read_multipliers(found: Keys) -> dict[str, Any]:
    """``mscale`` counts only beside ``mscale_all_dim``; an ``attention_factor`` is said by a multiplier."""
    if found["mscale"] and found["mscale_all_dim"]:
        if found["attention_factor"] is not None:
            raise found.unsupported("attention_factor")
        return {key: found.real(key) for key in ("mscale", "mscale_all_dim")}
    if found["mscale_all_dim"]:
        raise found.unsupported("mscale_all_dim")
    if found["attention_factor"] is None:
        return {}
    # The multiplier m for which 0.1 m ln(factor) + 1 is the factor that the file gives, rounded as
    # Yarn.temperature rounds, so that the paper's own factor gives 1 to the last bit.
    slope = (0.1 * math.log(max(found.real("factor"), 1.0)) + 1.0) - 1.0
    given = found.real("attention_factor")
    if not slope:
        raise found.unsupported("attention_factor")
    return {"mscale": (given - 1.0) / slope}


def write_attention(attention: Attention) -> dict[str, Any]:
    shared = {"num_attention_heads": attention.heads, "attention_dropout": 0.0}
    match attention:
        case GQA() as gqa:
            specific: dict[str, Any] = {"num_key_value_heads": gqa.kv_heads, "head_dim": gqa.head_dim}
        case MLA() as mla:
            specific = {
                "num_key_value_heads": mla.heads,
                "q_lora_rank": mla.q_rank,
                "kv_lora_rank": mla.kv_rank,
                "qk_nope_head_dim": mla.nope_dim,
                "qk_rope_head_dim": mla.rope_dim,
                "v_head_dim": mla.v_dim,
                "rope_interleave": mla.rope.interleaved,
            }
    return shared | specific | _write_rope(attention.rope)


def _write_rope(rope: Rope) -> dict[str, Any]:
    match rope.scaling:
        case Unscaled():
            scaling: dict[str, Any] | None = None
            kind: dict[str, Any] = {"rope_type": "default"}
        case Yarn() as yarn:
            kind = {
                "rope_type": "yarn",
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_length,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                "mscale": yarn.mscale,
                "mscale_all_dim": yarn.mscale_all_dim,
            }
            # transformers ignores mscale unless both are set; this key then says what it would have said.
            kind |= {} if yarn.mscale_all_dim and yarn.mscale else {"attention_factor": yarn.rotation_scale}
            scaling = {"type": "yarn", **kind}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": rope.theta, **kind},
    }
