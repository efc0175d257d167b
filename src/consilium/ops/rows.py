"""Rows: copies of tokens, one for each expert of a token's choice, and their sums by token.

Both directions are sums of rows by token in a fixed order, the order of the token's choices, so a token's
result does not depend on its neighbours. A bag sum does that in one pass without a [T, K, D] copy (several
times faster on CPU than gathering or ``index_add``); its backward is a gather, the other direction's forward.

Legend: T tokens, D hidden size, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class ByToken(NamedTuple):
    """Which token each row is of, both ways."""

    token_R: Tensor
    """int64: the token of each row."""
    row_R: Tensor
    """int64: all rows, listed by token and then in a fixed order: that in which a token adds them up."""
    first_T: Tensor
    """int64: where each token's rows begin in ``row_R``."""

    @staticmethod
    def of(token_R: Tensor, row_R: Tensor, used_T: Tensor) -> ByToken:
        """``used_T`` counts the rows of each token."""
        return ByToken(token_R, row_R, used_T.cumsum(dim=0) - used_T)

    def gather(self, x_TD: Tensor) -> Tensor:
        """Each row's token [R, D]."""
        return _Gather.apply(x_TD, self)

    def sum(self, y_RD: Tensor) -> Tensor:
        """Each token's sum [T, D] of rows, in at least float32."""
        return _Sum.apply(y_RD, self)

    def weighted_sum(self, y_RD: Tensor, weight_R: Tensor) -> Tensor:
        """Each token's sum [T, D] of weights times rows, in at least float32."""
        return _WeightedSum.apply(y_RD, weight_R, self)


@final
@dataclass(frozen=True, slots=True)
class Rows:
    """Copies of tokens, sorted by expert and each expert's in token order, made where they are used."""

    x_TD: Tensor
    by_token: ByToken
    weight_R: Tensor
    """At least float32, with gradient: of each row."""
    counts_E: tuple[int, ...]
    """Rows of each expert here; sums to R."""
    weight_on_input: bool = False

    def inputs(self) -> Tensor:
        """What enters the experts [R, D]."""
        x_RD = self.by_token.gather(self.x_TD)
        return (x_RD * self.weight_R[:, None]).to(x_RD.dtype) if self.weight_on_input else x_RD

    def outputs(self, y_RD: Tensor) -> Tensor:
        """Each token's sum [T, D] of what leaves them, in at least float32."""
        return (
            self.by_token.sum(y_RD)
            if self.weight_on_input
            else self.by_token.weighted_sum(y_RD, self.weight_R)
        )


def sum_by_token(y_RD: Tensor, weight_R: Tensor | None, by_token: ByToken) -> Tensor:
    """Sums [T, D] in at least float32, not differentiable: bfloat16 rows are widened first."""
    _, row_R, first_T = by_token
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    weights = None if weight_R is None else weight_R.to(wide)[row_R]
    if row_R.shape[0] == 0:
        return torch.zeros(first_T.shape[0], y_RD.shape[1], dtype=wide, device=y_RD.device)
    return F.embedding_bag(row_R, y_RD.to(wide), first_T, mode="sum", per_sample_weights=weights)


class _Gather(torch.autograd.Function):
    """x_TD[token_R], whose gradient is the sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, by_token: ByToken) -> Tensor:
        ctx.by_token = by_token
        return x_TD.index_select(0, by_token.token_R)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad_RD,) = grads
        return sum_by_token(grad_RD, None, ctx.by_token).to(grad_RD.dtype), None


class _Sum(torch.autograd.Function):
    """Sum over each token's rows, whose gradient is the token's."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, by_token: ByToken) -> Tensor:
        ctx.by_token, ctx.dtype = by_token, y_RD.dtype
        return sum_by_token(y_RD, None, by_token)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad_TD,) = grads
        return grad_TD.index_select(0, ctx.by_token.token_R).to(ctx.dtype), None


class _WeightedSum(torch.autograd.Function):
    """Sum over each token's rows of weight times row, with gradients of both."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weight_R: Tensor, by_token: ByToken) -> Tensor:
        ctx.save_for_backward(y_RD, weight_R)
        ctx.by_token = by_token
        return sum_by_token(y_RD, weight_R, by_token)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad_TD,) = grads
        y_RD, weight_R = ctx.saved_tensors
        wide = torch.promote_types(y_RD.dtype, torch.float32)
        grad_RD = grad_TD.to(wide).index_select(0, ctx.by_token.token_R)
        # Row by row dot products as a batched matrix product: no [R, D] temporary.
        grad_R = torch.bmm(grad_RD[:, None, :], y_RD.to(wide)[:, :, None]).flatten()
        grad_RD.mul_(weight_R[:, None])
        return grad_RD.to(y_RD.dtype), grad_R.to(weight_R.dtype), None
