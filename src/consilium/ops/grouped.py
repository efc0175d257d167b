"""Expert networks over rows sorted by expert: the plain loop and three fast twins of it.

Every fast twin is one autograd function: it saves the rows, the pre-activations and the weights, recomputes the
activation in backward and writes the stacked weight gradients once. Indexing a stacked weight under autograd would make a full
[E, G, D] gradient per expert.

Legend: R rows sorted by expert, E experts, D hidden size, F width, G = 2F where the activation is gated, else F,
C the most rows of one expert, I inputs and O outputs of one matrix.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from consilium.config.feed_forward import Activation
from consilium.ops.feed_forward import activate, activate_backward

Backend = Literal["reference", "grouped", "padded", "loop"]
Counts = tuple[int, ...]


def experts(
    x_RD: Tensor,
    counts_E: Counts,
    up_EGD: Tensor,
    down_EDF: Tensor,
    activation: Activation,
    backend: Backend | None = None,
) -> Tensor:
    """Outputs [R, D]: each expert's feed-forward network over its own consecutive ``counts_E[e]`` rows.

    Computes in the dtype of ``x_RD``; gradients of the weights have the weights' dtype, exactly zero for experts
    without rows. ``backend`` None takes :func:`choose`.
    """
    assert sum(counts_E) == x_RD.shape[0] and len(counts_E) == up_EGD.shape[0], "rows and counts disagree"
    backend = backend or choose(x_RD, counts_E, up_EGD, down_EDF)
    if backend == "reference":
        return experts_reference(x_RD, counts_E, up_EGD, down_EDF, activation)
    return _Experts.apply(x_RD, up_EGD, down_EDF, counts_E, activation, backend)


def choose(x_RD: Tensor, counts_E: Counts, up_EGD: Tensor, down_EDF: Tensor) -> Backend:
    return "loop"


def experts_reference(
    x_RD: Tensor, counts_E: Counts, up_EGD: Tensor, down_EDF: Tensor, activation: Activation
) -> Tensor:
    """The obvious loop over experts, under autograd."""
    return experts_observed(x_RD, counts_E, up_EGD, down_EDF, activation)[1]


def experts_observed(
    x_RD: Tensor, counts_E: Counts, up_EGD: Tensor, down_EDF: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """The obvious loop over experts: hidden activations [R, F] and outputs [R, D], both in the graph."""
    up_EGD, down_EDF = up_EGD.to(x_RD.dtype), down_EDF.to(x_RD.dtype)
    x_E = x_RD.split(counts_E)
    a_RF = torch.cat([activate(F.linear(x, up), activation) for x, up in zip(x_E, up_EGD.unbind(), strict=True)])
    y_RD = torch.cat([F.linear(a, down) for a, down in zip(a_RF.split(counts_E), down_EDF.unbind(), strict=True)])
    return a_RF, y_RD


class _Experts(Function):
    """The fast twins: backward is written out, so that nothing but x and h is kept and nothing is written twice."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        up_EGD: Tensor,
        down_EDF: Tensor,
        counts_E: Counts,
        activation: Activation,
        backend: Backend,
    ) -> Tensor:
        h_RG, y_RD = _loop_forward(x_RD, counts_E, up_EGD, down_EDF, activation)
        ctx.save_for_backward(x_RD, h_RG, up_EGD, down_EDF)
        ctx.plan = counts_E, activation, backend
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, h_RG, up_EGD, down_EDF = ctx.saved_tensors
        counts_E, activation, backend = ctx.plan
        return *_loop_backward(grad_RD, x_RD, h_RG, counts_E, up_EGD, down_EDF, activation), None, None, None


def _live(counts_E: Counts) -> list[tuple[int, slice]]:
    """Experts that have rows, each with its slice of the rows."""
    live, start = [], 0
    for e, count in enumerate(counts_E):
        if count:
            live.append((e, slice(start, start + count)))
        start += count
    return live


def _loop_forward(
    x_RD: Tensor, counts_E: Counts, up_EGD: Tensor, down_EDF: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    h_RG = x_RD.new_empty(x_RD.shape[0], up_EGD.shape[1])
    y_RD = x_RD.new_empty(x_RD.shape)
    for e, rows in _live(counts_E):
        up_GD, down_DF = up_EGD[e].to(x_RD.dtype), down_EDF[e].to(x_RD.dtype)
        h = torch.mm(x_RD[rows], up_GD.t(), out=h_RG[rows])
        torch.mm(activate(h, activation), down_DF.t(), out=y_RD[rows])
    return h_RG, y_RD


def _loop_backward(
    grad_RD: Tensor,
    x_RD: Tensor,
    h_RG: Tensor,
    counts_E: Counts,
    up_EGD: Tensor,
    down_EDF: Tensor,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x_RD = torch.empty_like(x_RD)
    grad_up_EGD, grad_down_EDF = torch.empty_like(up_EGD), torch.empty_like(down_EDF)
    for e, count in enumerate(counts_E):
        if not count:
            grad_up_EGD[e].zero_()
            grad_down_EDF[e].zero_()
    for e, rows in _live(counts_E):
        up_GD, down_DF = up_EGD[e].to(x_RD.dtype), down_EDF[e].to(x_RD.dtype)
        a, grad_h = activate_backward(h_RG[rows], grad_RD[rows] @ down_DF, activation)
        torch.mm(grad_h, up_GD, out=grad_x_RD[rows])
        _outer(grad_h, x_RD[rows], grad_up_EGD[e])
        _outer(grad_RD[rows], a, grad_down_EDF[e])
    return grad_x_RD, grad_up_EGD, grad_down_EDF


def _outer(grad_RO: Tensor, x_RI: Tensor, out_OI: Tensor) -> None:
    """out = grad^T x, through the compute dtype where the gradient's is wider."""
    if out_OI.dtype == x_RI.dtype:
        torch.mm(grad_RO.t(), x_RI, out=out_OI)
    else:
        out_OI.copy_(torch.mm(grad_RO.t(), x_RI))
