"""Transport: from tokens to rows sorted by expert where the experts are, and back to tokens.

What travels has a handle: the layer computes its shared experts between ``dispatch`` and ``finish``.

Legend: T tokens, D hidden size, E experts, K choices a token, N = T K copies, R rows = kept copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, final

import torch
from torch import Tensor

from consilium.moe.types import Routing
from consilium.ops.rows import ByToken, Rows

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
        """Wait for each token's sum [T, D] over all experts, in the dtype of the tokens."""
        ...


class Transport(Protocol[Ticket]):
    """Moves rows to where their experts are and back. What a ticket holds is its own affair."""

    def owned(self, experts: int) -> range:
        """Which of ``experts`` live here: a layer builds these and no others."""
        ...

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Sending[Ticket]: ...

    def combine(self, y_TD: Tensor, ticket: Ticket) -> Returning:
        """Bring home the sums that the experts here have, of at least float32."""
        ...


Transports = Callable[[int], Transport[Any]]
"""The transport of each MoE layer, by its index."""


LocalTicket = torch.dtype
"""Of the tokens."""


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

    def combine(self, y_TD: Tensor, ticket: LocalTicket) -> Returning:
        return _Summed(y_TD.to(ticket))


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
        rows = Rows(self.x_TD, by_token, weight_R, tuple(counts_E), self.routing.weight_on_input)
        return rows, self.x_TD.dtype


@final
@dataclass(frozen=True, slots=True)
class _Summed:
    y_TD: Tensor

    def finish(self) -> Tensor:
        return self.y_TD
