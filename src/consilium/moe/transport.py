"""Transport: from tokens to rows sorted by expert, and back to tokens with the weights applied.

What travels has a handle: the layer computes its shared experts between ``dispatch`` and ``finish``.

Legend: T tokens, D hidden size, E experts, K choices a token, N = T K copies, R rows = kept copies.

Both directions are sums of rows by token in a fixed order, the order of the token's choices, so a token's
result does not depend on its neighbours. A bag sum does that in one pass without a [T, K, D] copy (several
times faster on CPU than gathering or ``index_add``); its backward is a gather, the other direction's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from consilium.moe.types import Routing, Rows

Ticket = TypeVar("Ticket")
Ticket_co = TypeVar("Ticket_co", covariant=True)


class Sending(Protocol[Ticket_co]):
    """Rows on their way to the experts."""

    def finish(self) -> tuple[Rows, Ticket_co]:
        """Wait for the rows; the ticket brings them back."""
        ...


class Returning(Protocol):
    """Rows on their way back to their tokens."""

    def finish(self) -> Tensor:
        """Wait for each token's weighted sum [T, D] of rows: added in at least float32, in their dtype."""
        ...


class Transport(Protocol[Ticket]):
    """Moves rows to where their experts are and back. What a ticket holds is its own affair."""

    def owned(self, experts: int) -> range:
        """Which of ``experts`` live here: a layer builds these and no others."""
        ...

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Sending[Ticket]: ...

    def combine(self, y_RD: Tensor, ticket: Ticket) -> Returning: ...


Transports = Callable[[int], Transport[Any]]
"""The transport of each MoE layer, by its index."""


@final
@dataclass(frozen=True, slots=True)
class ByToken:
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
        return _Gather.apply(x_TD, self.token_R, self.row_R, self.first_T)

    def sum(self, y_RD: Tensor) -> Tensor:
        """Each token's sum [T, D] of rows, in at least float32."""
        return _Sum.apply(y_RD, self.token_R, self.row_R, self.first_T)

    def weighted_sum(self, y_RD: Tensor, weight_R: Tensor) -> Tensor:
        """Each token's sum [T, D] of weights times rows, in at least float32."""
        return _WeightedSum.apply(y_RD, weight_R, self.token_R, self.row_R, self.first_T)


@final
@dataclass(frozen=True, slots=True)
class LocalTicket:
    by_token: ByToken
    """A token adds its rows up in the order of its choices."""
    weight_R: Tensor
    """float32 with gradient; ones where the weight was put on the input."""


@final
class Local:
    """All experts are here, and nothing has to travel."""

    def owned(self, experts: int) -> range:
        return range(experts)

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Sending[LocalTicket]:
        """Rows of the kept copies, sorted by expert, each expert's in token order."""
        unused = routing.logits_TE.shape[1]
        slot_N = routing.experts_TK.masked_fill(~routing.keep_TK, unused).flatten()
        return _Sorted(x_TD, routing, slot_N.argsort(stable=True), routing.load_E())

    def combine(self, y_RD: Tensor, ticket: LocalTicket) -> Returning:
        return _Summed(ticket.by_token.weighted_sum(y_RD, ticket.weight_R).to(y_RD.dtype))


def local(layer: int) -> Transport[LocalTicket]:
    return Local()


@final
@dataclass(frozen=True, slots=True)
class _Sorted:
    x_TD: Tensor
    routing: Routing
    order_N: Tensor
    """int64: all copies by expert, those not kept last."""
    counts_E: Tensor

    def finish(self) -> tuple[Rows, LocalTicket]:
        """How many rows an expert has is all that the host learns of the device in a layer."""
        counts_E: list[int] = self.counts_E.tolist()
        keep_TK = self.routing.keep_TK
        copy_R = self.order_N[: sum(counts_E)]
        token_R = copy_R // max(keep_TK.shape[1], 1)
        by_token = ByToken.of(token_R, copy_R.argsort(), keep_TK.sum(dim=1))
        weight_R = self.routing.weights_TK.flatten().index_select(0, copy_R)
        x_RD = by_token.gather(self.x_TD)
        if self.routing.weight_on_input:
            x_RD = (x_RD * weight_R[:, None]).to(self.x_TD.dtype)
            weight_R = torch.ones_like(weight_R)
        return Rows(x_RD, tuple(counts_E)), LocalTicket(by_token, weight_R)


@final
@dataclass(frozen=True, slots=True)
class _Summed:
    y_TD: Tensor

    def finish(self) -> Tensor:
        return self.y_TD


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


class _Sum(torch.autograd.Function):
    """Sum over each token's rows, whose gradient is the token's."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, token_R: Tensor, row_R: Tensor, first_T: Tensor) -> Tensor:
        ctx.save_for_backward(token_R)
        ctx.dtype = y_RD.dtype
        return _sum_by_token(y_RD, None, row_R, first_T)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad_TD,) = grads
        (token_R,) = ctx.saved_tensors
        return grad_TD.index_select(0, token_R).to(ctx.dtype), None, None, None


class _WeightedSum(torch.autograd.Function):
    """Sum over each token's rows of weight times row, with gradients of both."""

    @staticmethod
    def forward(
        ctx: Any, y_RD: Tensor, weight_R: Tensor, token_R: Tensor, row_R: Tensor, first_T: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_RD, weight_R, token_R)
        return _sum_by_token(y_RD, weight_R, row_R, first_T)

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
