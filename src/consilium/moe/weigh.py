"""How much each used expert counts: the weight rules of ``consilium.config.router``.

Legend: T tokens, E experts, K most experts a token may use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilium.config.router import ClampedSum, Normalised, Raw, SoftmaxOfSelected, Uniform, Weight
from consilium.moe.select import Choice


def weigh(rule: Weight, scale: float, logits_TE: Tensor, scores_TE: Tensor, choice: Choice) -> Tensor:
    """Float32 weights [T, K], zero where not used, with finite gradients in rows that use nothing.

    Made from scores or logits without bias, normalised over the choices considered, then scaled.
    """
    considered_TK = choice.considered_TK
    match rule:
        case Raw():
            weights_TK = scores_TE.gather(1, choice.experts_TK)
        case Normalised(epsilon=epsilon):
            scores_TK = scores_TE.gather(1, choice.experts_TK).masked_fill(~considered_TK, 0)
            weights_TK = _divide(scores_TK, scores_TK.sum(dim=1, keepdim=True) + epsilon)
        case ClampedSum(minimum=minimum):
            scores_TK = scores_TE.gather(1, choice.experts_TK).masked_fill(~considered_TK, 0)
            weights_TK = scores_TK / scores_TK.sum(dim=1, keepdim=True).clamp_min(minimum)
        case SoftmaxOfSelected():
            weights_TK = _softmax_of_selected(logits_TE.gather(1, choice.experts_TK), considered_TK)
        case Uniform():
            weights_TK = torch.ones_like(choice.experts_TK, dtype=scores_TE.dtype)
    return (weights_TK * scale).masked_fill(~choice.keep_TK, 0)


def _divide(scores_TK: Tensor, total_T1: Tensor) -> Tensor:
    """Rows whose scores are all zero give zero and no gradient: dividing by epsilon alone would give 1e20."""
    empty_T1 = (scores_TK == 0).all(dim=1, keepdim=True)
    return (scores_TK / total_T1.masked_fill(empty_T1, 1)).masked_fill(empty_T1, 0)


def _softmax_of_selected(logits_TK: Tensor, considered_TK: Tensor) -> Tensor:
    """Softmax over the considered logits; a row of only -inf would have NaN gradients, so it gets zeros."""
    empty_T1 = ~considered_TK.any(dim=1, keepdim=True)
    return torch.softmax(logits_TK.masked_fill(~considered_TK, -torch.inf).masked_fill(empty_T1, 0), dim=1)
