"""Transport: from tokens to rows sorted by expert, and back to tokens with the weights applied.

Legend: T tokens, D hidden size, E experts, K choices a token, R rows = kept copies.

Both directions are sums of rows by token in a fixed order, the order of the token's choices, so a token's
result does not depend on its neighbours. A bag sum does that in one pass without a [T, K, D] copy (several
times faster on CPU than gathering or ``index_add``); its backward is a gather, the other direction's forward.
"""

from __future__ import annotations

from typing import Any, Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from consilium.moe.types import Routing, Rows, Ticket


class Transport(Protocol):
    """Moves rows to where their experts are and back."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Rows, Ticket]: ...

    def combine(self, y_RD: Tensor, ticket: Ticket) -> Tensor: ...


@final
class Local:
    """All experts are here."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Rows, Ticket]:
        """Rows of the kept copies, sorted by expert, each expert's in token order."""
        experts = routing.logits_TE.shape[1]
        copy_R = routing.keep_TK.flatten().nonzero().squeeze(1)
        expert_R = routing.experts_TK.flatten()[copy_R]
        order_R = expert_R.argsort(stable=True)
        row_R = torch.empty_like(order_R)
        row_R[order_R] = torch.arange(order_R.shape[0], device=order_R.device)
        copy_R = copy_R[order_R]
        used_T = routing.keep_TK.sum(dim=1)
        token_R = copy_R // max(routing.keep_TK.shape[1], 1)
        first_T = used_T.cumsum(dim=0) - used_T
        weight_R = routing.weights_TK.flatten().index_select(0, copy_R)
        x_RD: Tensor = _Gather.apply(x_TD, token_R, row_R, first_T)
        if routing.weight_on_input:
            x_RD = (x_RD * weight_R[:, None]).to(x_TD.dtype)
            weight_R = torch.ones_like(weight_R)
        counts_E = tuple(torch.bincount(expert_R, minlength=experts).tolist())
        return Rows(x_RD, counts_E), Ticket(token_R, weight_R, row_R, first_T)

    def combine(self, y_RD: Tensor, ticket: Ticket) -> Tensor:
        """Weighted sums [T, D] of each token's rows, added in at least float32, in the dtype of the rows."""
        return _Combine.apply(y_RD, ticket.weight_R, ticket.token_R, ticket.row_R, ticket.first_T)


def _sum_by_token(y_RD: Tensor, weight_R: Tensor | None, row_R: Tensor, first_T: Tensor) -> Tensor:
    """Sums [T, D] in at least float32: bfloat16 rows are widened first."""
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    weights = None if weight_R is None else weight_R.to(wide)[row_R]
    if row_R.shape[0] == 0:
        return torch.zeros(first_T.shape[0], y_RD.shape[1], dtype=wide, device=y_RD.device)
    return F.embedding_bag(row_R, y_RD.to(wide), first_T, mode="sum", per_sample_weights=weights)


class _Gather(torch.autograd.Function):
    """x_TD[token_R], whose gradient is the sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, row_R: Tensor, first_T: Tensor) -> Tensor:
        ctx.save_for_backward(row_R, first_T)
        return x_TD.index_select(0, token_R)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad_RD,) = grads
        row_R, first_T = ctx.saved_tensors
        return _sum_by_token(grad_RD, None, row_R, first_T).to(grad_RD.dtype), None, None, None


class _Combine(torch.autograd.Function):
    """Sum over each token's rows of weight times row, with gradients of both."""

    @staticmethod
    def forward(
        ctx: Any, y_RD: Tensor, weight_R: Tensor, token_R: Tensor, row_R: Tensor, first_T: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_RD, weight_R, token_R)
        return _sum_by_token(y_RD, weight_R, row_R, first_T).to(y_RD.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad_TD,) = grads
        y_RD, weight_R, token_R = ctx.saved_tensors
        wide = torch.promote_types(y_RD.dtype, torch.float32)
        grad_RD = grad_TD.to(wide).index_select(0, token_R)
        # Row by row dot products as a batched matrix product: no [R, D] temporary.
        grad_R = torch.bmm(grad_RD[:, None, :], y_RD.to(wide)[:, :, None]).flatten()
        grad_RD.mul_(weight_R[:, None])
        return grad_RD.to(y_RD.dtype), grad_R.to(weight_R.dtype), None, None, None
