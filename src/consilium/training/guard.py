"""The non-finite guard: a step with a bad loss or gradient changes nothing and is reported."""

from __future__ import annotations

import math

import torch
from torch import nn

from consilium.errors import ConsiliumError

PATIENCE = 10
"""Bad steps in a row after which the run stops: the data or the learning rate is at fault, not chance."""


def clip(model: nn.Module, largest: float) -> float:
    """Scale gradients to a global norm of at most ``largest`` and return the norm before. NaN stays NaN."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    return float(torch.nn.utils.clip_grad_norm_(parameters, largest, foreach=True))


def is_healthy(loss: float, norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(norm)


def check_patience(skipped_in_a_row: int, step: int) -> None:
    """Raise ConsiliumError once ``PATIENCE`` steps in a row were skipped."""
    if skipped_in_a_row >= PATIENCE:
        raise ConsiliumError(
            f"training stopped at step {step}: loss or gradient was not finite {PATIENCE} steps in a row;"
            " the weights are those of the last good step. Lower --lr, or look for bad values in the weights."
        )
