"""From a step's result to its record: loads become max/mean, dead experts and drops.

Legend: E routed experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from consilium.evaluation.bits import Evaluation
from consilium.evaluation.loads import ExpertLoad
from consilium.model.decoder import Decoder
from consilium.moe.balance import Balance
from consilium.records.loads import max_over_mean
from consilium.records.run import StepRecord
from consilium.training.step import StepResult


def step_record(
    step: int,
    tokens: int,
    tokens_per_second: float,
    result: StepResult,
    *,
    bias: float | None,
    spike: bool,
) -> StepRecord:
    return StepRecord(
        step=step,
        tokens=tokens,
        loss=result.loss,
        ce=result.ce,
        grad_norm=result.norm,
        lr=result.rate,
        tok_per_sec=tokens_per_second,
        skipped=float(result.skipped),
        spike=float(spike),
        bias_spread=bias,
        losses=result.balance | ({"mtp": result.ahead} if result.ahead else {}),
        **_routing(result.loads),
    )


def bias_spread(model: Decoder) -> float | None:
    """Highest less lowest selection bias of a layer, the worst layer; None where no bias selects."""
    biases = [module.bias_E for module in model.modules() if isinstance(module, Balance)]
    return max((float(bias_E.max() - bias_E.min()) for bias_E in biases if bias_E is not None), default=None)


def evaluation_record(step: int, tokens: int, evaluation: Evaluation) -> StepRecord:
    return StepRecord(
        step=step, tokens=tokens, bits_per_byte=evaluation.bits_per_byte, domains=evaluation.domains
    )


def shares_record(step: int, tokens: int, shares: Mapping[str, float]) -> StepRecord:
    return StepRecord(step=step, tokens=tokens, shares=shares)


def layer_ratios(loads: Mapping[int, ExpertLoad]) -> dict[int, float]:
    """max/mean load of each MoE layer."""
    return {layer: max_over_mean(load.counts) for layer, load in loads.items()}


def _routing(loads: Mapping[int, ExpertLoad]) -> dict[str, Any]:
    if not loads:
        return {}
    ratios = layer_ratios(loads)
    return {
        "layers": ratios,
        "max_over_mean": max(ratios.values(), key=lambda r: -math.inf if math.isnan(r) else r),
        "dead_experts": float(sum(int((load.load_E == 0).sum()) for load in loads.values())),
        "router_entropy": sum(load.entropy or 0.0 for load in loads.values()) / len(loads),
        "dropped_frac": sum(load.dropped_fraction for load in loads.values()) / len(loads),
    }
