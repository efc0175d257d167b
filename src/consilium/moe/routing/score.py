"""From logits to scores: transforms in order, then one score function. All float32, elementwise or by token.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from consilium.config.router import (
    Relu,
    Score,
    Sigmoid,
    Softcap,
    Softmax,
    SqrtSoftplus,
    Standardise,
    Transform,
)


def transform(logits_TE: Tensor, transforms: Sequence[Transform]) -> Tensor:
    """Logits after every transform, in the order of the configuration."""
    for step in transforms:
        match step:
            case Standardise(scale=scale, epsilon=epsilon):
                logits_TE = _standardise(logits_TE, scale, epsilon)
            case Softcap(cap=cap):
                logits_TE = cap * torch.tanh(logits_TE / cap)
            case _:
                assert_never(step)
    return logits_TE


def _standardise(z_TE: Tensor, scale: float, epsilon: float) -> Tensor:
    """Skywork-MoE equation 3 with the unbiased variance of the released code, and epsilon under the root.

    A gate that starts at zero has no variance: without epsilon its first gradient would be NaN.
    """
    centred_TE = z_TE - z_TE.mean(dim=1, keepdim=True)
    variance_T1 = centred_TE.square().sum(dim=1, keepdim=True) / max(z_TE.shape[1] - 1, 1)
    return scale * centred_TE / (variance_T1 + epsilon).sqrt()


def score(logits_TE: Tensor, kind: Score) -> Tensor:
    """Scores of the logits; only softmax makes them sum to one."""
    match kind:
        case Softmax():
            return torch.softmax(logits_TE, dim=1)
        case Sigmoid():
            return torch.sigmoid(logits_TE)
        case SqrtSoftplus():
            # The root has an infinite slope at zero, where softplus underflows.
            return F.softplus(logits_TE).clamp_min(torch.finfo(logits_TE.dtype).tiny).sqrt()
        case Relu():
            return torch.relu(logits_TE)
