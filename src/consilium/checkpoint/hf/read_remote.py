"""Configurations of weights that transformers lacks, by the keys of the code beside them. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from consilium.checkpoint.hf.keys import Keys, first, gqa, listed, number, only, switch_loss, unsupported


def grok(keys: Keys, path: Path) -> dict[str, Any]:
    """Grok-1 in the keys of either conversion. Its GELU is xAI's own, the tanh approximation."""
    only(keys, path, "hidden_act", "gelu", "gelu_new", "gelu_pytorch_tanh")
    only(keys, path, "residual_moe", False)
    for key in ("moe_intermediate_size", "final_logit_softcapping"):
        only(keys, path, key)
    attention = gqa(keys, path)
    scale = keys.get("attn_output_multiplier")
    attention["softcap"] = first(keys, "max_attn_value", "attn_logit_softcapping", default=30.0)
    attention["scale"] = None if scale == attention["head_dim"] ** -0.5 else scale
    moe = {
        "experts": number(keys, path, "num_experts", "num_local_experts"),
        "width": number(keys, path, "intermediate_size"),
        "activation": "geglu",
        "router": {
            "select": {"kind": "top_k", "k": first(keys, "num_experts_per_tok", default=2)},
            "weight": {"kind": "raw"},
        },
        "balance": switch_loss(keys, 0.0),
    }
    return {
        "attention": attention,
        "moe": moe,
        "norms": "around",
        "embedding_scale": first(keys, "embedding_multiplier_scale", default=1.0),
        "logit_scale": first(keys, "output_multiplier_scale", default=1.0),
    }


def skywork_moe(keys: Keys, path: Path) -> dict[str, Any]:
    """Skywork-MoE: a softmax of standardised logits, top-2, divided by their sum."""
    only(keys, path, "hidden_act", "silu")
    only(keys, path, "moe_expert_interval", 1)
    only(keys, path, "moe_2layer_gate", False)
    only(keys, path, "moe_use_skywork_gating", False)
    if not keys.get("moe_use_mixtral_gating"):
        only(keys, path, "moe_feature_no_mul_topk", True)
    standard = {"kind": "standardise", "scale": first(keys, "moe_gate_norm_std", default=1.0)}
    moe = {
        "experts": _experts(keys, path),
        "width": number(keys, path, "intermediate_size"),
        "router": {
            "transforms": [standard] if first(keys, "moe_use_logits_norm", default=True) else [],
            "select": {"kind": "top_k", "k": first(keys, "num_experts_per_tok", default=2)},
        },
    }
    return {"attention": gqa(keys, path), "moe": moe}


def _experts(keys: Keys, path: Path) -> int:
    """The number of experts, which one generation of keys gives as a list of one."""
    listed = keys.get("num_experts")
    single = {"num_experts": listed[0]} if isinstance(listed, list) and len(listed) == 1 else {}
    return number({**keys, **single}, path, "num_local_experts", "num_experts")


def llama_moe(keys: Keys, path: Path) -> dict[str, Any]:
    """LLaMA-MoE: a gate with a hidden layer and learned noise, softmax of the selected, a factor."""
    only(keys, path, "hidden_act", "silu")
    only(keys, path, "gate_type", "TopKBalancedNoisyGate")
    only(keys, path, "calculator_type", "UniversalCalculator")
    only(keys, path, "gate_use_softmax", True)
    only(keys, path, "multiply_gate_scores", True)
    only(keys, path, "add_weight_norm", False)
    only(keys, path, "gate_network", "mlp", "linear")
    noisy = first(keys, "gate_add_noise", default=True)
    floor = first(keys, "gate_noise_epsilon", default=1e-2)
    moe = {
        "experts": number(keys, path, "num_experts"),
        "width": _width(keys, path),
        "router": {
            "projection": {"kind": first(keys, "gate_network", default="mlp")},
            "noise": {"kind": "learned", "floor": floor} if noisy else {"kind": "none"},
            "select": {"kind": "top_k", "k": number(keys, path, "num_selects")},
            "weight": {"kind": "softmax_of_selected"},
            "scale": _one(first(keys, "score_scale_factor", default=1.0), "score_scale_factor", path),
        },
        "balance": {"losses": _importance_and_load(keys, noisy=bool(noisy))},
    }
    return {"attention": gqa(keys, path), "moe": moe}


def _importance_and_load(keys: Keys, *, noisy: bool) -> list[dict[str, Any]]:
    """Without noise their load is a count, which has no gradient."""
    weight = first(keys, "gate_balance_loss_weight", default=1e-2)
    if not weight or not first(keys, "gate_use_balance", default=True):
        return []
    kinds = ("importance", "load") if noisy else ("importance",)
    return [{"kind": kind, "coefficient": weight} for kind in kinds]


def _width(keys: Keys, path: Path) -> int:
    """Experts share ``intermediate_size``; ``size_experts`` may say so for every layer and expert."""
    experts, total = number(keys, path, "num_experts"), number(keys, path, "intermediate_size")
    sizes, width = listed(keys, path, "size_experts"), total // experts
    equal = all(
        isinstance(layer, list) and len(layer) == experts and set(layer) == {width} for layer in sizes
    )
    if total % experts or not equal:
        raise unsupported(path, "size_experts", sizes)
    return width


def _one(value: object, key: str, path: Path) -> object:
    """A number, or the one that a list of a number a layer repeats."""
    if not isinstance(value, list):
        return value
    if not value or any(each != value[0] for each in value):
        raise unsupported(path, key, value)
    return value[0]
