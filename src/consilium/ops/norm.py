"""Root mean square normalisation (1910.07467) with float32 statistics."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis; float32 inside, the dtype of ``x`` outside."""
    return F.rms_norm(x.float(), weight_D.shape, weight_D.float(), epsilon).to(x.dtype)


@final
class RMSNorm(nn.Module):
    """:func:`rms_norm` with a learned ``weight`` [size] that starts at one."""

    def __init__(self, size: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, epsilon={self.epsilon}"
