"""The rules that move the selection bias of a layer once an optimizer step.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from consilium.config.balance import SMEBU, BiasRule, LinearBias, NoBias, PIDBias, QuantileBias, SignBias
from consilium.moe.types import Taken


def memory(rule: BiasRule, experts: int) -> dict[str, Tensor]:
    """What a rule keeps from step to step beside the bias, as it begins."""
    match rule:
        case SMEBU():
            return {"momentum_E": torch.zeros(experts)}
        case PIDBias():
            return {"errors_2E": torch.zeros(2, experts)}
        case NoBias() | SignBias() | LinearBias() | QuantileBias():
            return {}


def move(rule: BiasRule, bias_E: Tensor, kept: Mapping[str, Tensor], taken: Taken) -> None:
    """Move ``bias_E`` and what the rule keeps, both float32, in place."""
    experts, total = bias_E.shape[0], taken.wanted_E.sum()
    # Over the sum: mean - count is exact in integers as total - E * count.
    short_E = (total - taken.wanted_E * experts).to(bias_E.device)
    relative_E = short_E / total.to(bias_E.device).clamp_min(1)
    match rule:
        case NoBias():
            pass
        case SignBias(rate=rate, centred=centred):
            sign_E = short_E.sign().float()
            bias_E += rate * (sign_E - sign_E.mean() if centred else sign_E)
        case LinearBias(rate=rate):
            bias_E += rate * relative_E
        case SMEBU(rate=rate, steepness=steepness, momentum=momentum):
            clamped_E = torch.tanh(steepness * relative_E)
            kept["momentum_E"].lerp_(rate * (clamped_E - clamped_E.mean()), 1 - momentum)
            bias_E += kept["momentum_E"]
        case PIDBias():
            _pid(rule, bias_E, kept["errors_2E"], relative_E / experts)
        case QuantileBias(momentum=momentum):
            assert taken.margins is not None, "quantile balancing reads the margins of the step"
            beyond_E = taken.margins.beyond(int(total) // experts, taken.reduce)
            bias_E -= (1 - momentum) * beyond_E.to(bias_E.device)


def _pid(rule: PIDBias, bias_E: Tensor, errors_2E: Tensor, error_E: Tensor) -> None:
    """In increments, so that a bias that was trained before goes on from where it is."""
    last_E, before_E = errors_2E.clone()
    bias_E += rule.integral * error_E
    bias_E += rule.proportional * (error_E - last_E)
    bias_E += rule.derivative * (error_E - 2 * last_E + before_E)
    errors_2E.copy_(torch.stack((error_E, last_E)))
