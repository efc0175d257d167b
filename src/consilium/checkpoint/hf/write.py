"""The network of a configuration in the keys of each architecture. No torch."""

from __future__ import annotations

from typing import Any

from consilium.checkpoint.hf.architecture import Architecture
from consilium.checkpoint.hf.windows import write_windows
from consilium.config.attention import GQA
from consilium.config.balance import ImportanceLoss, SequenceLoss, SwitchLoss
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.router import LearnedNoise, MLPGate, Raw, Standardise, TopK


def network(config: Model, found: Architecture) -> dict[str, Any]:
    """Keys of feed-forward networks, experts and router, and what only this architecture asks for."""
    dense = None if config.dense is None else config.dense.width
    if config.moe is None:
        return {"intermediate_size": dense, **write_windows(config, found)}
    moe = config.moe
    match found:
        case "llama" | "mistral" | "qwen2" | "qwen3":
            raise AssertionError("a dense architecture has no experts")
        case "mixtral":
            return _local_experts(moe) | {"router_jitter_noise": 0.0, **write_windows(config, found)}
        case "qwen2_moe" | "qwen3_moe":
            windows = write_windows(config, found)
            return {**_qwen(config, moe), **windows, "intermediate_size": dense or moe.width}
        case "olmoe":
            return _local_experts(moe) | {"norm_topk_prob": _normalised(moe)}
        case "deepseek" | "deepseek_v2":
            method = "greedy" if _groups(moe) == (1, 1) else "group_limited_greedy"
            return {"intermediate_size": dense or moe.width, **_deepseek(config, moe), "topk_method": method}
        case "deepseek_v3":
            specific = {**_deepseek(config, moe), "num_nextn_predict_layers": config.mtp.depth}
            return {"intermediate_size": dense or moe.width, **specific}
        case "grok-1":
            return _local_experts(moe) | _grok(config)
        case "skywork_moe":
            return _local_experts(moe) | _skywork(moe)
        case "llama_moe":
            return _llama_moe(moe)


def _normalised(moe: MoE) -> bool:
    return not isinstance(moe.router.weight, Raw)


def _coefficient(moe: MoE, kind: type[SwitchLoss | SequenceLoss | ImportanceLoss]) -> float:
    return sum((loss.coefficient for loss in moe.balance.losses if isinstance(loss, kind)), start=0.0)


def _local_experts(moe: MoE) -> dict[str, Any]:
    """Experts of ``intermediate_size`` in every layer. Both spellings of their number have readers."""
    return {
        "intermediate_size": moe.width,
        "num_experts": moe.experts,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.most_active,
        "router_aux_loss_coef": _coefficient(moe, SwitchLoss),
        "output_router_logits": False,
    }


def _qwen(config: Model, moe: MoE) -> dict[str, Any]:
    step = config.moe_every if config.dense_first % config.moe_every == 0 else 1
    dense = [i for i in range(config.layers) if (i + 1) % step == 0 and not config.is_moe(i)]
    bias = isinstance(config.attention, GQA) and config.attention.qkv_bias
    shared = {"shared_expert_intermediate_size": moe.shared_width, "qkv_bias": bias}
    return {
        **_local_experts(moe),
        "moe_intermediate_size": moe.width,
        "norm_topk_prob": _normalised(moe),
        "decoder_sparse_step": step,
        "mlp_only_layers": dense,
        **(shared if moe.shared_width else {}),
    }


def _groups(moe: MoE) -> tuple[int, int]:
    """Number of groups of experts and how many are kept."""
    select = moe.router.served.select
    assert isinstance(select, TopK), "every architecture has a top-k router"
    groups = select.groups
    return (1, 1) if groups is None else (groups.count, groups.keep)


def _deepseek(config: Model, moe: MoE) -> dict[str, Any]:
    count, keep = _groups(moe)
    alpha = _coefficient(moe, SequenceLoss)
    return {
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared_width // moe.width or None,
        "num_experts_per_tok": moe.most_active,
        "moe_intermediate_size": moe.width,
        "first_k_dense_replace": config.dense_first,
        "n_group": count,
        "topk_group": keep,
        "norm_topk_prob": _normalised(moe),
        "routed_scaling_factor": moe.router.scale,
        "aux_loss_alpha": alpha or _coefficient(moe, SwitchLoss),
        "seq_aux": bool(alpha) or not _coefficient(moe, SwitchLoss),
    }


def _grok(config: Model) -> dict[str, Any]:
    assert isinstance(config.attention, GQA), "Grok-1 has grouped-query attention"
    return {
        "attn_output_multiplier": config.attention.softmax_scale,
        "max_attn_value": config.attention.softcap,
        "embedding_multiplier_scale": config.embedding_scale,
        "output_multiplier_scale": config.logit_scale,
    }


def _skywork(moe: MoE) -> dict[str, Any]:
    (standard,) = (step for step in moe.router.transforms if isinstance(step, Standardise))
    return {
        "num_experts": [moe.experts],
        "moe_use_logits_norm": True,
        "moe_gate_norm_std": standard.scale,
        "moe_use_mixtral_gating": False,
        "moe_feature_no_mul_topk": True,
    }


def _llama_moe(moe: MoE) -> dict[str, Any]:
    router = moe.router
    learned = router.noise if isinstance(router.noise, LearnedNoise) else None
    weight = _coefficient(moe, ImportanceLoss)
    return {
        "intermediate_size": moe.experts * moe.width,
        "num_experts": moe.experts,
        "num_selects": moe.most_active,
        "size_experts": None,
        "gate_network": "mlp" if isinstance(router.projection, MLPGate) else "linear",
        "gate_use_balance": bool(weight),
        "gate_balance_loss_weight": weight,
        "gate_add_noise": learned is not None,
        "gate_noise_epsilon": 0.01 if learned is None else learned.floor,
        "score_scale_factor": router.scale,
    }
