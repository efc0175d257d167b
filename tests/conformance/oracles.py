"""The routers of transformers, asked with the inputs of a case.

They know no padding and see valid tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHTopkRouter
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.switch_transformers import modeling_switch_transformers as switch

Data = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What transformers says about a case's valid tokens, in their order."""

    weights: list[dict[int, float]]
    """Expert to weight, before any capacity."""
    admitted: list[set[int]] | None
    """Experts left by its capacity, where it has one."""
    losses: dict[str, float]
    """Before coefficients, with the value 1 at perfect balance."""


Oracle = Callable[[Data, Data], Answer]


def inputs(case: Data) -> Tensor:
    valid = case.get("valid_T") or [True] * len(case["x_TD"])
    return torch.tensor([row for row, ok in zip(case["x_TD"], valid, strict=True) if ok])


def gate(moe: Data, case: Data) -> Tensor:
    given = case.get("parameters", {}).get("projection.weight")
    return torch.eye(moe["experts"]) if given is None else torch.tensor(given)


def settings(moe: Data, case: Data) -> SimpleNamespace:
    """Every name under which a configuration of transformers keeps what a router reads."""
    router = moe["router"]
    select, groups = router["select"], router["select"].get("groups")
    return SimpleNamespace(
        hidden_size=gate(moe, case).shape[1],
        num_experts=moe["experts"],
        num_local_experts=moe["experts"],
        num_experts_per_tok=select.get("k", 2),
        norm_topk_prob=router["weight"]["kind"] == "normalised",
        routed_scaling_factor=router["scale"],
        topk_method="greedy" if groups is None else "group_limited_greedy",
        n_group=groups["count"] if groups else 1,
        topk_group=groups["keep"] if groups else 1,
        router_bias=False,
        router_jitter_noise=0.0,
        router_ignore_padding_tokens=False,
        router_dtype="float32",
        second_expert_policy="all",
        normalize_router_prob_before_dropping=True,
        batch_prioritized_routing=False,
        moe_eval_capacity_token_fraction=-1.0,
    )


def top_k(router_class: Any) -> Oracle:
    """Routers that return logits, weights and expert numbers."""

    @torch.no_grad()
    def ask(moe: Data, case: Data) -> Answer:
        router: nn.Module = router_class(settings(moe, case))
        router.weight.copy_(gate(moe, case))
        if moe["router"]["offset"] == "scores":
            router.e_score_correction_bias.copy_(torch.tensor(case.get("bias_E") or [0.0] * moe["experts"]))
        logits_TE, weights_TK, experts_TK = router(inputs(case))
        rows = zip(experts_TK.tolist(), weights_TK.tolist(), strict=True)
        return Answer([dict(zip(*row, strict=True)) for row in rows], None, pooled(logits_TE, experts_TK))

    return ask


def pooled(logits_TE: Tensor, experts_TK: Tensor) -> dict[str, float]:
    """The loss of Mixtral, Qwen and OLMoE, which is k at balance; its counts ignore groups and biases."""
    k = experts_TK.shape[1]
    return {"switch": float(load_balancing_loss_func((logits_TE,), logits_TE.shape[1], k)) / k}


@torch.no_grad()
def top_1(moe: Data, case: Data) -> Answer:
    """Switch: its capacity is a count that keeps the first tokens of a row; this batch is one row."""
    x_TD = inputs(case)
    limit = math.ceil(moe["admission"]["factor"] * x_TD.shape[0] / moe["experts"] - 1e-9)

    def ask(expert_capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        config = settings(moe, case)
        config.expert_capacity = expert_capacity
        router = switch.SwitchTransformersTop1Router(config)
        router.classifier.weight.copy_(gate(moe, case))
        return router(x_TD[None])

    chosen_TE, probability_T1, logits_TE = (value[0] for value in ask(x_TD.shape[0]))
    kept_TE = ask(limit)[0][0]
    experts_T = chosen_TE.argmax(dim=1)
    balance = switch.load_balancing_loss_func(logits_TE.softmax(dim=1)[None], experts_T[None])
    return Answer(
        [{int(e): float(w)} for e, w in zip(experts_T, probability_T1, strict=True)],
        [set(row.nonzero().flatten().tolist()) for row in kept_TE],
        {"switch": float(balance), "z": float(switch.router_z_loss_func(logits_TE[None]))},
    )


@torch.no_grad()
def top_2(moe: Data, case: Data) -> Answer:
    """GShard's gating as NLLB has it: both gates are divided by their sum before any drop."""
    x_TD, limits = inputs(case), moe["admission"]
    run = limits["group_tokens"] or len(x_TD)

    def gates(part_TD: Tensor, expert_capacity: int) -> Tensor:
        config = settings(moe, case)
        config.expert_capacity = expert_capacity
        router = NllbMoeTop2Router(config)
        router.classifier.weight.copy_(gate(moe, case))
        return router(part_TD)[1]

    weights, admitted = [], []
    for part_TD in x_TD.split(run):
        limit = math.ceil(limits["factor"] * part_TD.shape[0] * 2 / moe["experts"] - 1e-9)
        weights += [_nonzero(row) for row in gates(part_TD, part_TD.shape[0] * 2)]
        admitted += [set(_nonzero(row)) for row in gates(part_TD, limit)]
    return Answer(weights, admitted, {})


def _nonzero(gates_E: Tensor) -> dict[int, float]:
    return {int(e): float(gates_E[e]) for e in gates_E.nonzero().flatten()}


ORACLES: dict[str, tuple[str, Oracle]] = {
    "gshard": ("NllbMoeTop2Router", top_2),
    "switch": ("SwitchTransformersTop1Router", top_1),
    "mixtral": ("MixtralTopKRouter", top_k(MixtralTopKRouter)),
    "deepseek-v2": ("DeepseekV2TopkRouter", top_k(DeepseekV2TopkRouter)),
    "deepseek-v3": ("DeepseekV3TopkRouter", top_k(DeepseekV3TopkRouter)),
    "qwen-moe": ("Qwen2MoeTopKRouter", top_k(Qwen2MoeTopKRouter)),
    "qwen3-moe": ("Qwen3MoeTopKRouter", top_k(Qwen3MoeTopKRouter)),
    "olmoe": ("OlmoeTopKRouter", top_k(OlmoeTopKRouter)),
    "latent-moe": ("NemotronHTopkRouter", top_k(NemotronHTopkRouter)),
}
