"""Foreign config.json files of the architectures that we know, as our configuration. No torch.

What we would compute differently is refused by name, never approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from consilium.config.io import from_data
from consilium.config.model import Model
from consilium.errors import ConsiliumError, nearest

Keys = Mapping[str, Any]


def from_hugging_face(keys: Keys, path: Path) -> Model:
    """Return our configuration of a llama, mixtral, deepseek_v2 or deepseek_v3, or raise ConsiliumError."""
    kind = str(keys.get("model_type"))
    if kind not in _READERS:
        raise ConsiliumError(f"{path}: architecture {kind!r} is not known here.{nearest(kind, _READERS)}")
    _only(keys, path, "hidden_act", "silu")
    _only(keys, path, "attention_bias", False)
    shared: dict[str, Any] = {
        "family": kind.replace("_", "-"),
        "vocab_size": _number(keys, path, "vocab_size"),
        "hidden_size": _number(keys, path, "hidden_size"),
        "layers": _number(keys, path, "num_hidden_layers"),
        "norm_epsilon": keys.get("rms_norm_eps", 1e-6),
        "tied": keys.get("tie_word_embeddings", False),
        "max_length": keys.get("max_position_embeddings", 4096),
        "init": {"kind": "normal", "std": keys.get("initializer_range") or 0.02},
    }
    return from_data(Model, shared | _READERS[kind](keys, path), where=str(path))


def _llama(keys: Keys, path: Path) -> dict[str, Any]:
    _only(keys, path, "mlp_bias", False)
    return {"attention": _gqa(keys, path, theta=1e4), "dense": _dense(keys, path)}


def _mixtral(keys: Keys, path: Path) -> dict[str, Any]:
    _only(keys, path, "sliding_window", None)
    coefficient = keys.get("router_aux_loss_coef", 0.001)
    moe = {
        "experts": _number(keys, path, "num_local_experts"),
        "width": _number(keys, path, "intermediate_size"),
        "router": {"select": {"kind": "top_k", "k": keys.get("num_experts_per_tok", 2)}},
        "balance": {"losses": [{"kind": "switch", "coefficient": coefficient}] if coefficient else []},
    }
    return {"attention": _gqa(keys, path, theta=1e6), "moe": moe}


def _deepseek_v2(keys: Keys, path: Path) -> dict[str, Any]:
    # Its own code and transformers disagree on V2 with normalised weights; no published model has them.
    _only(keys, path, "norm_topk_prob", False)
    _only(keys, path, "scoring_func", "softmax")
    method = keys.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise _unsupported(path, "topk_method", method)
    groups = _groups(keys, "max") if method == "group_limited_greedy" else None
    router = {
        "score": {"kind": "softmax"},
        "select": {"kind": "top_k", "k": _number(keys, path, "num_experts_per_tok"), "groups": groups},
        "weight": {"kind": "raw"},
        "scale": keys.get("routed_scaling_factor", 1.0),
    }
    return _deepseek(keys, path, router, bias={"kind": "none"})


def _deepseek_v3(keys: Keys, path: Path) -> dict[str, Any]:
    _only(keys, path, "scoring_func", "sigmoid")
    _only(keys, path, "topk_method", "noaux_tc")
    groups = _groups(keys, "top2_sum") if (keys.get("n_group") or 1) != 1 else None
    router = {
        "score": {"kind": "sigmoid"},
        "offset": "scores",
        "select": {"kind": "top_k", "k": _number(keys, path, "num_experts_per_tok"), "groups": groups},
        "weight": {"kind": "normalised" if keys.get("norm_topk_prob", True) else "raw"},
        "scale": keys.get("routed_scaling_factor", 2.5),
    }
    found = _deepseek(keys, path, router, bias={"kind": "sign"})
    return found | {"mtp": {"depth": keys.get("num_nextn_predict_layers", 0)}}


def _deepseek(keys: Keys, path: Path, router: dict[str, Any], bias: dict[str, Any]) -> dict[str, Any]:
    _only(keys, path, "moe_layer_freq", 1)
    width, shared = _number(keys, path, "moe_intermediate_size"), keys.get("n_shared_experts") or 0
    alpha = keys.get("aux_loss_alpha") or 0.0
    return {
        "attention": _mla(keys, path),
        "dense": _dense(keys, path),
        "dense_first": keys.get("first_k_dense_replace", 0),
        "moe": {
            "experts": _number(keys, path, "n_routed_experts"),
            "width": width,
            "router": router,
            "shared": {"kind": "always_on", "count": shared, "width": width} if shared else {"kind": "none"},
            "balance": {
                "losses": [{"kind": "sequence", "coefficient": alpha}] if alpha else [],
                "bias": bias,
            },
        },
    }


def _dense(keys: Keys, path: Path) -> dict[str, Any]:
    return {"width": _number(keys, path, "intermediate_size")}


def _groups(keys: Keys, score: str) -> dict[str, Any]:
    return {"count": keys.get("n_group"), "keep": keys.get("topk_group"), "score": score}


def _gqa(keys: Keys, path: Path, *, theta: float) -> dict[str, Any]:
    heads = _number(keys, path, "num_attention_heads")
    return {
        "kind": "gqa",
        "heads": heads,
        "kv_heads": keys.get("num_key_value_heads") or heads,
        "head_dim": keys.get("head_dim") or _number(keys, path, "hidden_size") // heads,
        "rope": _rope(keys, path, theta),
    }


def _mla(keys: Keys, path: Path) -> dict[str, Any]:
    return {
        "kind": "mla",
        "heads": _number(keys, path, "num_attention_heads"),
        "q_rank": keys.get("q_lora_rank"),
        "kv_rank": _number(keys, path, "kv_lora_rank"),
        "nope_dim": _number(keys, path, "qk_nope_head_dim"),
        "rope_dim": _number(keys, path, "qk_rope_head_dim"),
        "v_dim": _number(keys, path, "v_head_dim"),
        "rope": _rope(keys, path, 1e4) | {"interleaved": keys.get("rope_interleave", True)},
    }


def _rope(keys: Keys, path: Path, theta: float) -> dict[str, Any]:
    found = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise _unsupported(path, "rope_parameters", found)
    if found.get("partial_rotary_factor", keys.get("partial_rotary_factor") or 1.0) != 1.0:
        raise _unsupported(path, "partial_rotary_factor", found.get("partial_rotary_factor"))
    kind = found.get("rope_type", found.get("type", "default"))
    rope = {"theta": found.get("rope_theta", keys.get("rope_theta", theta))}
    if kind == "default":
        return rope
    if kind != "yarn":
        raise _unsupported(path, "rope_type", kind)
    return rope | {"scaling": _yarn(found, path)}


def _yarn(found: Keys, path: Path) -> dict[str, Any]:
    yarn = {
        "kind": "yarn",
        "factor": found.get("factor"),
        "original_length": found.get("original_max_position_embeddings"),
        "beta_fast": found.get("beta_fast") or 32.0,
        "beta_slow": found.get("beta_slow") or 1.0,
    }
    if found.get("mscale") and found.get("mscale_all_dim"):
        return yarn | {"mscale": found["mscale"], "mscale_all_dim": found["mscale_all_dim"]}
    if found.get("attention_factor") is not None or found.get("mscale_all_dim"):
        raise _unsupported(path, "rope_parameters", dict(found))
    return yarn


def _number(keys: Keys, path: Path, key: str) -> int:
    value = keys.get(key)
    if type(value) is not int or value < 1:
        raise ConsiliumError(
            f"{path}: {key} is {value!r} and must be a positive whole number; restore the file."
        )
    return value


def _only(keys: Keys, path: Path, key: str, value: object) -> None:
    if keys.get(key, value) != value:
        raise _unsupported(path, key, keys[key])


def _unsupported(path: Path, key: str, value: object) -> ConsiliumError:
    return ConsiliumError(f"{path}: {key} {str(value)[:60]!r} is not computed here; use a model without it.")


_READERS: Final[Mapping[str, Callable[[Keys, Path], dict[str, Any]]]] = {
    "llama": _llama,
    "mixtral": _mixtral,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
}
