"""How much each used expert counts: the weight rules of ``consilium.config.router``.

Legend: T tokens, G groups, E experts, K most experts a token may use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilium.config.router import ClampedSum, Normalised, Raw, Router, SoftmaxOfSelected, TwoLevel, Uniform
from consilium.moe.routing.select import Choice


def weigh(config: Router, logits_TE: Tensor, scores_TE: Tensor, choice: Choice) -> Tensor:
    """Float32 weights [T, K], zero where not used, with finite gradients in rows that use nothing.

    Made from scores or logits without bias, normalised over the choices considered, then scaled.
    """
    considered_TK = choice.considered_TK
    match config.weight:
        case Raw():
            weights_TK = scores_TE.gather(1, choice.experts_TK)
        case Normalised(epsilon=epsilon):
            scores_TK = scores_TE.gather(1, choice.experts_TK).masked_fill(~considered_TK, 0)
            weights_TK = _divide(scores_TK, scores_TK.sum(dim=1, keepdim=True) + epsilon)
        case ClampedSum(minimum=minimum):
            scores_TK = scores_TE.gather(1, choice.experts_TK).masked_fill(~considered_TK, 0)
            weights_TK = scores_TK / scores_TK.sum(dim=1, keepdim=True).clamp_min(minimum)
        case SoftmaxOfSelected():
            logits_TK = logits_TE.gather(1, choice.experts_TK)
            if isinstance(config.select, TwoLevel):
                logits_TK = _levelled(logits_TK, logits_TE, config.select.groups, choice)
            weights_TK = _softmax_of_selected(logits_TK, considered_TK)
        case Uniform():
            weights_TK = torch.ones_like(choice.experts_TK, dtype=scores_TE.dtype)
    return (weights_TK * config.scale).masked_fill(~choice.wanted_TK, 0)


def _divide(scores_TK: Tensor, total_T1: Tensor) -> Tensor:
    """Rows whose scores are all zero give zero and no gradient: dividing by epsilon alone would give 1e20."""
    empty_T1 = (scores_TK == 0).all(dim=1, keepdim=True)
    return (scores_TK / total_T1.masked_fill(empty_T1, 1)).masked_fill(empty_T1, 0)


def _softmax_of_selected(logits_TK: Tensor, considered_TK: Tensor) -> Tensor:
    """Softmax over the considered logits; a row of only -inf would have NaN gradients, so it gets zeros."""
    empty_T1 = ~considered_TK.any(dim=1, keepdim=True)
    return torch.softmax(logits_TK.masked_fill(~considered_TK, -torch.inf).masked_fill(empty_T1, 0), dim=1)


def _levelled(logits_TK: Tensor, logits_TE: Tensor, groups: int, choice: Choice) -> Tensor:
    """Logits whose softmax is one over the groups considered times one inside each (Shazeer 2017 appendix B).

    Joint log-probabilities of a group add up to the group's own; what is left is divided among the experts
    considered in it.
    """
    group_TG = logits_TE.unflatten(1, (groups, -1)).logsumexp(dim=2)
    group_TK = choice.experts_TK // (logits_TE.shape[1] // groups)
    rivals_TKK = (group_TK[:, :, None] == group_TK[:, None, :]) & choice.considered_TK[:, None, :]
    # Its own rival always: a row of only -inf would have NaN gradients.
    rivals_TKK = rivals_TKK | torch.eye(group_TK.shape[1], dtype=torch.bool, device=group_TK.device)
    within_TKK = logits_TK[:, None, :].masked_fill(~rivals_TKK, -torch.inf).log_softmax(dim=2)
    return group_TG.gather(1, group_TK) + within_TKK.diagonal(dim1=1, dim2=2)
