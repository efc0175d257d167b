"""Cross-entropy of a linear head without ever holding the logits of all tokens.

Legend: T tokens, C tokens of one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from consilium.ops.weights import Dense, Matrix

IGNORE = -1
"""The target of a token that has nothing to predict."""

CHUNK = 512
"""Tokens at a time. Fewer read and write the weight's gradient more often than the products can hide: at
V 32000 and D 1024, 128 tokens take 1.1 times and 64 tokens 1.5 times as long. More only hold more logits."""


def linear_cross_entropy(
    hidden_TD: Tensor, head_VD: Matrix, targets_T: Tensor, *, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of -log softmax(hidden head^T)[target], and how many tokens had a target.

    Returns a float32 scalar (nats) with gradient to ``hidden_TD`` and ``head_VD``, and an int64 scalar.
    Targets of -1 count for nothing. Matrix products run in the dtype of ``hidden_TD``, the softmax in
    float32, the weight's gradient adds up in float32. Loss and the gradients that somebody asked for are made
    ``chunk`` tokens at a time in the forward pass.
    """
    assert hidden_TD.shape[0] == targets_T.shape[0], "hidden and targets disagree"
    count = (targets_T != IGNORE).sum()
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or head_VD.needs_gradient):
        assert isinstance(head_VD, Dense), "a head in a storage format is not trained through"
        return _LinearCrossEntropy.apply(hidden_TD, head_VD.weight_OI, targets_T, chunk), count
    parts = zip(hidden_TD.split(chunk), targets_T.split(chunk), strict=True)
    return torch.stack([token_nll(head_VD.times(h_CD), t_C).sum() for h_CD, t_C in parts]).sum(), count


def token_nll(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each token [T] in float32 nats, zero where the target is -1."""
    log_p_TV = F.log_softmax(_wide(logits_TV), dim=-1)
    nll_T = -log_p_TV.gather(1, targets_T.clamp(min=0).unsqueeze(1)).squeeze(1)
    return nll_T.masked_fill(targets_T == IGNORE, 0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int) -> Tensor:
        compute_VD = weight_VD.to(hidden_TD.dtype)
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        grad_hidden_TD = torch.empty_like(hidden_TD) if for_hidden else None
        grad_weight_VD = torch.zeros_like(_wide(weight_VD)) if for_weight else None
        nll = _wide(hidden_TD.new_zeros(()))
        for start in range(0, hidden_TD.shape[0], chunk):
            part = slice(start, start + chunk)
            nll_C, grad_CV = _nll_and_grad(F.linear(hidden_TD[part], compute_VD), targets_T[part])
            nll += nll_C.sum()
            if grad_hidden_TD is not None:
                torch.mm(grad_CV, compute_VD, out=grad_hidden_TD[part])
            if grad_weight_VD is not None:
                _add_outer(grad_weight_VD, grad_CV, hidden_TD[part])
        kept_VD = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        ctx.save_for_backward(grad_hidden_TD, kept_VD)
        return nll

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's own type
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        return *(None if grad is None else grad * grads[0] for grad in ctx.saved_tensors), None, None


def _nll_and_grad(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each token and its gradient softmax - onehot, the latter in the dtype of the logits."""
    log_p_CV = F.log_softmax(_wide(logits_CV), dim=-1)
    target_C1, ignored_C = targets_C.clamp(min=0).unsqueeze(1), targets_C == IGNORE
    nll_C = -log_p_CV.gather(1, target_C1).squeeze(1).masked_fill(ignored_C, 0)
    grad_CV = log_p_CV.exp_()
    grad_CV.scatter_add_(1, target_C1, grad_CV.new_full(target_C1.shape, -1.0))
    grad_CV.masked_fill_(ignored_C.unsqueeze(1), 0)
    return nll_C, grad_CV.to(logits_CV.dtype)


def _add_outer(total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """Add grad^T hidden, through the compute dtype where the total's is wider."""
    if total_VD.dtype == hidden_CD.dtype:
        total_VD.addmm_(grad_CV.t(), hidden_CD)
    else:
        total_VD.add_(torch.mm(grad_CV.t(), hidden_CD))
