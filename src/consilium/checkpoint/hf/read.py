"""Foreign config.json files of the architectures that we know, as our configuration. No torch.

What we would compute differently is refused by name, never approximated. Keys have had several spellings;
all of them are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from consilium.checkpoint.hf.architecture import CLASSES
from consilium.checkpoint.hf.keys import (
    Keys,
    first,
    gqa,
    listed,
    number,
    only,
    rope,
    switch_loss,
    unsupported,
)
from consilium.checkpoint.hf.read_remote import grok, llama_moe, skywork_moe
from consilium.config.io import from_data
from consilium.config.model import MOST_LAYERS, Model
from consilium.errors import ConsiliumError, nearest


def from_hugging_face(keys: Keys, path: Path) -> Model:
    """Return our configuration of a model type that we know, or raise ConsiliumError.

    A file without ``model_type`` is known by the class it names.
    """
    kind = _kind(keys)
    if kind not in _READERS:
        raise ConsiliumError(f"{path}: architecture {kind!r} is not known here.{nearest(kind, _READERS)}")
    shared: dict[str, Any] = {
        "family": _FAMILIES.get(kind, kind.replace("_", "-")),
        "vocab_size": number(keys, path, "vocab_size"),
        "hidden_size": number(keys, path, "hidden_size"),
        "layers": _layers(keys, path),
        "norm_epsilon": keys.get("rms_norm_eps", _EPSILONS.get(kind, 1e-6)),
        "tied": keys.get("tie_word_embeddings", kind in _TIED),
        "max_length": first(keys, "max_position_embeddings", default=4096),
        "init": {"kind": "normal", "std": keys.get("initializer_range") or 0.02},
    }
    return from_data(Model, shared | _READERS[kind](keys, path), where=str(path))


def _kind(keys: Keys) -> str:
    if keys.get("model_type") is not None:
        return str(keys["model_type"])
    named = keys.get("architectures")
    last = str(named[0]) if isinstance(named, list) and named else "None"
    return _KINDS.get(last, last)


def _layers(keys: Keys, path: Path) -> int:
    layers = number(keys, path, "num_hidden_layers")
    if layers > MOST_LAYERS:
        raise ConsiliumError(
            f"{path}: num_hidden_layers is {layers}, and no model has more than {MOST_LAYERS};"
            " restore the file."
        )
    return layers


def _llama(keys: Keys, path: Path) -> dict[str, Any]:
    only(keys, path, "hidden_act", "silu")
    only(keys, path, "mlp_bias", False)
    return {"attention": gqa(keys, path), "dense": {"width": number(keys, path, "intermediate_size")}}


def _qwen2(keys: Keys, path: Path) -> dict[str, Any]:
    _full_attention(keys, path)
    return _llama(keys, path) | {"attention": gqa(keys, path, qkv_bias=True)}


def _qwen3(keys: Keys, path: Path) -> dict[str, Any]:
    _full_attention(keys, path)
    attention = gqa({"head_dim": 128} | dict(keys), path, qk_norm="head")
    return _llama(keys, path) | {"attention": attention}


def _mixtral(keys: Keys, path: Path) -> dict[str, Any]:
    only(keys, path, "hidden_act", "silu")
    only(keys, path, "sliding_window")
    moe = {
        "experts": number(keys, path, "num_local_experts", "num_experts"),
        "width": number(keys, path, "intermediate_size"),
        "router": {"select": {"kind": "top_k", "k": first(keys, "num_experts_per_tok", default=2)}},
        "balance": switch_loss(keys, 0.001),
    }
    return {"attention": gqa(keys, path, theta=1e6), "moe": moe}


def _qwen2_moe(keys: Keys, path: Path) -> dict[str, Any]:
    shared = number(keys, path, "shared_expert_intermediate_size")
    attention = gqa(keys, path, qkv_bias=first(keys, "qkv_bias", default=True))
    moe = _softmax_moe(keys, path) | {"shared": {"kind": "sigmoid_gated", "width": shared}}
    return {"attention": attention, "moe": moe, **_schedule(keys, path)}


def _qwen3_moe(keys: Keys, path: Path) -> dict[str, Any]:
    attention = gqa(keys, path, qk_norm="head")
    return {"attention": attention, "moe": _softmax_moe(keys, path), **_schedule(keys, path)}


def _olmoe(keys: Keys, path: Path) -> dict[str, Any]:
    only(keys, path, "clip_qkv")
    moe = _softmax_moe({**keys, "moe_intermediate_size": keys.get("intermediate_size")}, path, loss=0.01)
    return {"attention": gqa(keys, path, qk_norm="full"), "moe": moe}


def _softmax_moe(keys: Keys, path: Path, *, loss: float = 0.001) -> dict[str, Any]:
    """Softmax over all experts, then top-k, then their sum where ``norm_topk_prob`` says so."""
    only(keys, path, "hidden_act", "silu")
    weight = {"kind": "normalised" if keys.get("norm_topk_prob") else "raw"}
    select = {"kind": "top_k", "k": number(keys, path, "num_experts_per_tok")}
    return {
        "experts": number(keys, path, "num_experts", "num_local_experts"),
        "width": number(keys, path, "moe_intermediate_size"),
        "router": {"select": select, "weight": weight},
        "balance": switch_loss(keys, loss),
    }


def _full_attention(keys: Keys, path: Path) -> None:
    only(keys, path, "use_sliding_window", False)
    kinds = listed(keys, path, "layer_types")
    if any(kind != "full_attention" for kind in kinds):
        raise unsupported(path, "layer_types", kinds)


def _schedule(keys: Keys, path: Path) -> dict[str, Any]:
    """Which layers route: those that ``decoder_sparse_step`` hits and ``mlp_only_layers`` does not name."""
    _full_attention(keys, path)
    layers, step = _layers(keys, path), first(keys, "decoder_sparse_step", default=1)
    dense = listed(keys, path, "mlp_only_layers")
    if type(step) is not int or step < 1:
        raise unsupported(path, "decoder_sparse_step", step)
    routed = [i for i in range(layers) if (i + 1) % step == 0 and i not in dense]
    # The distance to the next layer that routes; one alone has its next behind the last.
    every = (routed[1:] or [layers])[0] - routed[0] if routed else 1
    before = routed[0] - every + 1 if routed else -1
    if before < 0 or routed != list(range(routed[0], layers, every)):
        raise unsupported(path, "mlp_only_layers", dense)
    width = number(keys, path, "intermediate_size")
    return {"dense": {"width": width}, "dense_first": before, "moe_every": every}


def _deepseek_v2(keys: Keys, path: Path) -> dict[str, Any]:
    # Its own code and transformers disagree on V2 with normalised weights; no published model has them.
    only(keys, path, "norm_topk_prob", False)
    only(keys, path, "scoring_func", "softmax")
    only(keys, path, "topk_method", "greedy", "group_limited_greedy")
    groups = _groups(keys, "max") if keys.get("topk_method") == "group_limited_greedy" else None
    router = {
        "score": {"kind": "softmax"},
        "select": {"kind": "top_k", "k": number(keys, path, "num_experts_per_tok"), "groups": groups},
        "weight": {"kind": "raw"},
        "scale": first(keys, "routed_scaling_factor", default=1.0),
    }
    return {"attention": _mla(keys, path), **_deepseek(keys, path, router)}


def _deepseek_v3(keys: Keys, path: Path) -> dict[str, Any]:
    only(keys, path, "scoring_func", "sigmoid")
    only(keys, path, "topk_method", "noaux_tc")
    groups = _groups(keys, "top2_sum") if (keys.get("n_group") or 1) != 1 else None
    router = {
        "score": {"kind": "sigmoid"},
        "offset": "scores",
        "select": {"kind": "top_k", "k": number(keys, path, "num_experts_per_tok"), "groups": groups},
        "weight": {"kind": "normalised" if first(keys, "norm_topk_prob", default=True) else "raw"},
        "scale": first(keys, "routed_scaling_factor", default=2.5),
    }
    found = _deepseek(keys, path, router, bias="sign")
    depth = first(keys, "num_nextn_predict_layers", "num_mtp_layers", default=0)
    return {"attention": _mla(keys, path), **found, "mtp": {"depth": depth}}


def _groups(keys: Keys, score: str) -> dict[str, Any]:
    return {"count": keys.get("n_group"), "keep": keys.get("topk_group"), "score": score}


def _mla(keys: Keys, path: Path) -> dict[str, Any]:
    only(keys, path, "attention_bias", False)
    return {
        "kind": "mla",
        "heads": number(keys, path, "num_attention_heads"),
        "q_rank": keys.get("q_lora_rank"),
        "kv_rank": number(keys, path, "kv_lora_rank"),
        "nope_dim": number(keys, path, "qk_nope_head_dim"),
        "rope_dim": number(keys, path, "qk_rope_head_dim"),
        "v_dim": number(keys, path, "v_head_dim"),
        "rope": rope(keys, path, 1e4) | {"interleaved": first(keys, "rope_interleave", default=True)},
    }


def _deepseek_moe(keys: Keys, path: Path) -> dict[str, Any]:
    only(keys, path, "scoring_func", "softmax")
    router = {
        "select": {"kind": "top_k", "k": number(keys, path, "num_experts_per_tok")},
        "weight": {"kind": "normalised" if keys.get("norm_topk_prob") else "raw"},
    }
    return {"attention": gqa(keys, path), **_deepseek(keys, path, router)}


def _deepseek(keys: Keys, path: Path, router: dict[str, Any], bias: str = "none") -> dict[str, Any]:
    only(keys, path, "hidden_act", "silu")
    only(keys, path, "moe_layer_freq", 1)
    width, shared = number(keys, path, "moe_intermediate_size"), keys.get("n_shared_experts") or 0
    kind = "sequence" if first(keys, "seq_aux", default=True) else "switch"
    alpha = keys.get("aux_loss_alpha") or 0.0
    losses = [{"kind": kind, "coefficient": alpha}] if alpha else []
    moe = {
        "experts": number(keys, path, "n_routed_experts"),
        "width": width,
        "router": router,
        "shared": {"kind": "always_on", "count": shared, "width": width} if shared else {"kind": "none"},
        "balance": {"losses": losses, "bias": {"kind": bias}},
    }
    dense = {"width": number(keys, path, "intermediate_size")}
    return {"dense": dense, "dense_first": first(keys, "first_k_dense_replace", default=0), "moe": moe}


_READERS: Final[Mapping[str, Callable[[Keys, Path], dict[str, Any]]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek": _deepseek_moe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "grok-1": grok,
    "grok": grok,
    "skywork_moe": skywork_moe,
    "llama_moe": llama_moe,
}
_KINDS: Final = {name: kind for kind, name in CLASSES.items()} | {"GrokForCausalLM": "grok"}
_FAMILIES: Final = {"qwen2_moe": "qwen-moe", "deepseek": "deepseek-moe", "grok": "grok-1"}
"""Recipes that are not called as the model type is."""
_EPSILONS: Final = {"mixtral": 1e-5, "olmoe": 1e-5, "grok-1": 1e-5, "grok": 1e-5}
"""What the classes take where a file does not give ``rms_norm_eps``."""
_TIED: Final = frozenset({"grok-1", "grok"})
