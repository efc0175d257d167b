"""Foreign config.json files of the families that we know, as our configuration. No torch.

What we would compute differently is refused by the name of its key, never approximated. What a file leaves
out is its family's default (``families``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from consilium.checkpoint.hf.attention import read_gqa, read_mla
from consilium.checkpoint.hf.families import FAMILIES
from consilium.checkpoint.hf.foreign import completed, kind_of
from consilium.checkpoint.hf.keys import Keys
from consilium.checkpoint.hf.read_remote import grok, llama_moe, skywork_moe
from consilium.checkpoint.hf.windows import read_agreed_window, read_layer_windows, read_window
from consilium.config.io import from_data
from consilium.config.model import MOST_LAYERS, Model


def from_hugging_face(found: Mapping[str, Any], path: Path) -> Model:
    """Return our configuration of the contents ``found`` of ``path``, or raise ConsiliumError."""
    kind = kind_of(found, path)
    keys = completed(found, path, kind)
    if keys.number("num_hidden_layers") > MOST_LAYERS:
        raise keys.wrong("num_hidden_layers", f"at most {MOST_LAYERS}, and no model has more")
    shared: dict[str, Any] = {
        "family": FAMILIES[kind].recipe,
        "vocab_size": keys.number("vocab_size"),
        "hidden_size": keys.number("hidden_size"),
        "layers": keys.number("num_hidden_layers"),
        "norm_epsilon": keys.real("rms_norm_eps"),
        "tied": keys.flag("tie_word_embeddings"),
        "max_length": keys.number("max_position_embeddings"),
        "init": {"kind": "normal", "std": keys.coefficient("initializer_range") or 0.02},
    }
    return from_data(Model, shared | _READERS[kind](keys), where=str(path))


def _llama(keys: Keys) -> dict[str, Any]:
    return {"attention": read_gqa(keys), "dense": {"width": keys.number("intermediate_size")}}


def _mistral(keys: Keys) -> dict[str, Any]:
    return _llama(keys) | {"attention": read_gqa(keys, **read_window(keys))}


def _qwen2(keys: Keys) -> dict[str, Any]:
    window = read_layer_windows(keys, "last")
    return _llama(keys) | {"attention": read_gqa(keys, qkv_bias=True, **window)}


def _qwen3(keys: Keys) -> dict[str, Any]:
    window = read_layer_windows(keys, "last")
    return _llama(keys) | {"attention": read_gqa(keys, qk_norm="head", **window)}


def _mixtral(keys: Keys) -> dict[str, Any]:
    _refuse_one(keys)
    experts = keys.number("num_local_experts")
    moe = {
        "experts": experts,
        "width": keys.number("intermediate_size"),
        "router": {"select": _top_k(keys, experts)},
        "balance": _switch_loss(keys),
    }
    return {"attention": read_gqa(keys, **read_window(keys)), "moe": moe}


def _qwen2_moe(keys: Keys) -> dict[str, Any]:
    shared = {"kind": "sigmoid_gated", "width": keys.number("shared_expert_intermediate_size")}
    moe = _softmax_moe(keys, "moe_intermediate_size") | {"shared": shared}
    window = read_layer_windows(keys, "even")
    attention = read_gqa(keys, qkv_bias=keys.flag("qkv_bias"), **window)
    return {"attention": attention, "moe": moe, **_schedule(keys)}


def _qwen3_moe(keys: Keys) -> dict[str, Any]:
    moe = _softmax_moe(keys, "moe_intermediate_size")
    attention = read_gqa(keys, qk_norm="head", **read_agreed_window(keys))
    return {"attention": attention, "moe": moe, **_schedule(keys)}


def _olmoe(keys: Keys) -> dict[str, Any]:
    return {"attention": read_gqa(keys, qk_norm="full"), "moe": _softmax_moe(keys, "intermediate_size")}


def _softmax_moe(keys: Keys, width: str) -> dict[str, Any]:
    """Softmax over all experts, then top-k, then their sum where ``norm_topk_prob`` says so."""
    experts = keys.number("num_experts")
    router = {"select": _top_k(keys, experts), "weight": _weight(keys)}
    moe = {"experts": experts, "width": keys.number(width), "router": router}
    return {**moe, "balance": _switch_loss(keys)}


def _top_k(keys: Keys, experts: int) -> dict[str, Any]:
    k = keys.number("num_experts_per_tok")
    if k > experts:
        raise keys.wrong("num_experts_per_tok", f"at most the number of experts, {experts}")
    return {"kind": "top_k", "k": k}


def _weight(keys: Keys) -> dict[str, Any]:
    normalised = keys.flag("norm_topk_prob")
    if normalised:
        _refuse_one(keys)
    return {"kind": "normalised" if normalised else "raw"}


def _refuse_one(keys: Keys) -> None:
    """The weight of a single expert divided by itself is 1 and teaches the router nothing."""
    if keys.number("num_experts_per_tok") == 1:
        raise keys.wrong("num_experts_per_tok", "at least 2 where weights are divided by their sum")


def _switch_loss(keys: Keys) -> dict[str, Any]:
    """The one balance loss that most of transformers' models share, where its coefficient is not zero."""
    coefficient = keys.coefficient("router_aux_loss_coef")
    return {"losses": [{"kind": "switch", "coefficient": coefficient}] if coefficient else []}


def _schedule(keys: Keys) -> dict[str, Any]:
    """Which layers route: those that ``decoder_sparse_step`` hits and ``mlp_only_layers`` does not name."""
    layers, step = keys.number("num_hidden_layers"), keys.number("decoder_sparse_step")
    dense = keys.listed("mlp_only_layers")
    if any(type(i) is not int for i in dense):
        raise keys.wrong("mlp_only_layers", "a list of layers")
    skipped = set(dense)
    routed = [i for i in range(layers) if (i + 1) % step == 0 and i not in skipped]
    # The distance to the next layer that routes; one alone has its next behind the last.
    every = (routed[1:] or [layers])[0] - routed[0] if routed else 1
    before = routed[0] - every + 1 if routed else layers
    if before < 0 or (routed and routed != list(range(routed[0], layers, every))):
        raise keys.unsupported("mlp_only_layers" if dense else "decoder_sparse_step")
    width = keys.number("intermediate_size")
    return {"dense": {"width": width}, "dense_first": before, "moe_every": every}


def _deepseek_moe(keys: Keys) -> dict[str, Any]:
    router = {"select": _top_k(keys, keys.number("n_routed_experts")), "weight": _weight(keys)}
    shared = 0 if keys["n_shared_experts"] is None else keys.number("n_shared_experts", least=0)
    return {"attention": read_gqa(keys), **_deepseek(keys, router, shared)}


def _deepseek_v2(keys: Keys) -> dict[str, Any]:
    limited = keys.choice("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy"
    select = _top_k(keys, keys.number("n_routed_experts"))
    router = {
        "score": {"kind": "softmax"},
        "select": select | ({"groups": _groups(keys, "max")} if limited else {}),
        "weight": {"kind": "raw"},
        "scale": keys.real("routed_scaling_factor"),
    }
    found = _deepseek(keys, router, keys.number("n_shared_experts", least=0))
    return {"attention": read_mla(keys, interleaved=True), **found}


def _deepseek_v3(keys: Keys) -> dict[str, Any]:
    select = _top_k(keys, keys.number("n_routed_experts"))
    router = {
        "score": {"kind": "sigmoid"},
        "offset": "scores",
        "select": select | {"groups": _groups(keys, "top2_sum")},
        "weight": _weight(keys),
        "scale": keys.real("routed_scaling_factor"),
    }
    found = _deepseek(keys, router, keys.number("n_shared_experts", least=0), bias="sign")
    depth = keys["num_nextn_predict_layers"] and keys.number("num_nextn_predict_layers")
    attention = read_mla(keys, interleaved=keys.flag("rope_interleave"))
    return {"attention": attention, **found, "mtp": {"depth": depth or 0}}


def _groups(keys: Keys, score: str) -> dict[str, Any] | None:
    """One group is none. A group has at least the experts that its score looks at."""
    experts, count, keep = (keys.number(key) for key in ("n_routed_experts", "n_group", "topk_group"))
    if experts % count or (score == "top2_sum" and experts // count < 2):
        raise keys.wrong("n_group", f"a divisor of n_routed_experts, {experts}, with two or more a group")
    if keep > count:
        raise keys.wrong("topk_group", f"at most n_group, {count}")
    if keys.number("num_experts_per_tok") > keep * (experts // count):
        raise keys.wrong("num_experts_per_tok", "at most the experts of topk_group groups")
    return None if count == 1 else {"count": count, "keep": keep, "score": score}


def _deepseek(keys: Keys, router: dict[str, Any], shared: int, bias: str = "none") -> dict[str, Any]:
    width = keys.number("moe_intermediate_size")
    alpha = keys.coefficient("aux_loss_alpha")
    kind = "sequence" if keys.flag("seq_aux") else "switch"
    moe = {
        "experts": keys.number("n_routed_experts"),
        "width": width,
        "router": router,
        "shared": {"kind": "always_on", "count": shared, "width": width} if shared else {"kind": "none"},
        "balance": {
            "losses": [{"kind": kind, "coefficient": alpha}] if alpha else [],
            "bias": {"kind": bias},
        },
    }
    first = keys.number("first_k_dense_replace", least=0)
    return {"dense": {"width": keys.number("intermediate_size")}, "dense_first": first, "moe": moe}


_READERS: Final[Mapping[str, Callable[[Keys], dict[str, Any]]]] = {
    "llama": _llama,
    "mistral": _mistral,
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
