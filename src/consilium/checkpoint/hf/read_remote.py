"""Configurations of weights that transformers lacks, by the keys of the code beside them. No torch."""

from __future__ import annotations

from typing import Any

from consilium.checkpoint.hf.attention import read_gqa
from consilium.checkpoint.hf.keys import Keys


def grok(keys: Keys) -> dict[str, Any]:
    """Grok-1 in the keys of either conversion. Its GELU is xAI's own, the tanh approximation."""
    attention = read_gqa(keys)
    scale = keys.coefficient("attn_output_multiplier")
    attention["softcap"] = keys.real("max_attn_value")
    attention["scale"] = None if scale in {0.0, attention["head_dim"] ** -0.5} else scale
    loss = keys.coefficient("router_aux_loss_coef")
    moe = {
        "experts": keys.number("num_experts"),
        "width": keys.number("intermediate_size"),
        "activation": "geglu",
        "router": {
            "select": {"kind": "top_k", "k": _most(keys, "num_experts_per_tok")},
            "weight": {"kind": "raw"},
        },
        "balance": {"losses": [{"kind": "switch", "coefficient": loss}] if loss else []},
    }
    return {
        "attention": attention,
        "moe": moe,
        "norms": "around",
        "embedding_scale": keys.real("embedding_multiplier_scale"),
        "logit_scale": keys.real("output_multiplier_scale"),
    }


def skywork_moe(keys: Keys) -> dict[str, Any]:
    """Skywork-MoE: a softmax of standardised logits, top-2, divided by their sum."""
    if not keys.flag("moe_use_mixtral_gating") and not keys.flag("moe_feature_no_mul_topk"):
        raise keys.unsupported("moe_feature_no_mul_topk")
    standard = {"kind": "standardise", "scale": keys.real("moe_gate_norm_std")}
    moe = {
        "experts": keys.number("num_local_experts"),
        "width": keys.number("intermediate_size"),
        "router": {
            "transforms": [standard] if keys.flag("moe_use_logits_norm") else [],
            "select": {"kind": "top_k", "k": _most(keys, "num_experts_per_tok", "num_local_experts")},
        },
    }
    return {"attention": read_gqa(keys), "moe": moe}


def llama_moe(keys: Keys) -> dict[str, Any]:
    """LLaMA-MoE: a gate with a hidden layer and learned noise, softmax of the selected, a factor."""
    noisy = keys.flag("gate_add_noise")
    noise = (
        {"kind": "learned", "floor": keys.coefficient("gate_noise_epsilon")} if noisy else {"kind": "none"}
    )
    moe = {
        "experts": keys.number("num_experts"),
        "width": _width(keys),
        "router": {
            "projection": {"kind": keys.choice("gate_network", "mlp", "linear")},
            "noise": noise,
            "select": {"kind": "top_k", "k": _most(keys, "num_selects")},
            "weight": {"kind": "softmax_of_selected"},
            "scale": _one(keys, "score_scale_factor").real("score_scale_factor"),
        },
        "balance": {"losses": _importance_and_load(keys, noisy=noisy)},
    }
    return {"attention": read_gqa(keys), "moe": moe}


def _most(keys: Keys, key: str, experts: str = "num_experts") -> int:
    if keys.number(key) > keys.number(experts):
        raise keys.wrong(key, f"at most {experts}, {keys[experts]}")
    return keys.number(key)


def _importance_and_load(keys: Keys, *, noisy: bool) -> list[dict[str, Any]]:
    """Without noise their load is a count, which has no gradient."""
    weight = keys.coefficient("gate_balance_loss_weight")
    if not weight or not keys.flag("gate_use_balance"):
        return []
    kinds = ("importance", "load") if noisy else ("importance",)
    return [{"kind": kind, "coefficient": weight} for kind in kinds]


def _width(keys: Keys) -> int:
    """Experts share ``intermediate_size``; ``size_experts`` may say so for every layer and expert."""
    experts, total = keys.number("num_experts"), keys.number("intermediate_size")
    sizes, width = keys.listed("size_experts"), total // experts
    equal = all(
        isinstance(layer, list) and len(layer) == experts and all(size == width for size in layer)
        for layer in sizes
    )
    if total % experts or not equal:
        raise keys.unsupported("size_experts" if sizes else "intermediate_size")
    return width


def _one(keys: Keys, key: str) -> Keys:
    """With the one value of ``key`` that a list of a value a layer repeats."""
    value = keys[key]
    if not isinstance(value, list):
        return keys
    if not value or any(each != value[0] for each in value):
        raise keys.unsupported(key)
    return Keys(keys.path, {**keys.values, key: value[0]})
