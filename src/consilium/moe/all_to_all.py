"""Experts over several processes: rows go to where their experts are, and partial sums come back.

A token's row travels once to each process that has experts of its choice, however many, with their numbers
and weights beside it. There ``Local`` sorts the rows that arrived by expert, as if they were tokens of its
own, and adds up each one's outputs; one float32 row a process comes back, and the token adds up those.

Legend: T tokens, D hidden size, E experts, K choices a token, P processes, L = E / P experts of one, S rows
that leave, G rows that arrive, R rows = kept copies at the experts here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from consilium.moe.transport import Local, LocalTicket, Returning, Sending, Transports, local
from consilium.moe.types import Routing
from consilium.ops.rows import ByToken, Rows
from consilium.parallel.exchange import Route, Travelling, begin
from consilium.parallel.group import Group
from consilium.parallel.topology import share

DISPATCH: Final = "dispatch"
DISPATCH_BACK: Final = "dispatch, backward"
COMBINE: Final = "combine"
COMBINE_BACK: Final = "combine, backward"
_ELSEWHERE: Final = -1


def over(group: Group) -> Transports:
    """The transport of every layer whose experts are dealt over ``group``."""
    return local if group.size == 1 else lambda layer: AllToAll(group)


@final
@dataclass(frozen=True, slots=True)
class AllToAllTicket:
    dtype: LocalTicket
    route: Route
    by_token: ByToken
    """Of the rows that left."""


@final
class AllToAll:
    """Each process of ``group`` has as many experts, in order. ``all_to_all_single`` with uneven splits."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def owned(self, experts: int) -> range:
        return share(experts, self.group.rank, self.group.size)

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Sending[AllToAllTicket]:
        """How many rows go where is all that the host learns before they leave."""
        here = routing.logits_TE.shape[1] // self.group.size
        process_TK = (routing.experts_TK // here).masked_fill(~routing.keep_TK, self.group.size)
        sent_TP = torch.zeros(
            process_TK.shape[0], self.group.size + 1, dtype=torch.bool, device=process_TK.device
        )
        sent_TP = sent_TP.scatter(1, process_TK, value=True)[:, :-1]
        route = Route.of(self.group, DISPATCH, sent_TP.sum(dim=0).tolist())
        process_S, token_S = sent_TP.t().nonzero().unbind(dim=1)
        by_token = ByToken.of(token_S, token_S.argsort(stable=True), sent_TP.sum(dim=1))
        here_SK = process_TK[token_S] == process_S[:, None]
        expert_SK = (routing.experts_TK[token_S] % here).masked_fill(~here_SK, _ELSEWHERE)
        weights_SK = routing.weights_TK.index_select(0, token_S).masked_fill(~here_SK, 0)
        parts = (by_token.gather(x_TD), weights_SK, expert_SK.to(torch.int32))
        return _Sent(begin(route, parts, back=DISPATCH_BACK), by_token, here, routing.weight_on_input)

    def combine(self, y_TD: Tensor, ticket: AllToAllTicket) -> Returning:
        travelling = begin(ticket.route.back(COMBINE), (y_TD,), back=COMBINE_BACK)
        return _Returned(travelling, ticket.by_token, ticket.dtype)


@final
@dataclass(frozen=True, slots=True)
class _Sent:
    travelling: Travelling
    by_token: ByToken
    experts: int
    """That live here."""
    weight_on_input: bool

    def finish(self) -> tuple[Rows, AllToAllTicket]:
        """Sort what arrived by the experts here: by process, then by token, inside each."""
        x_GD, weights_GK, expert_GK = self.travelling.finish()
        decision = _decision(weights_GK, expert_GK.long(), self.experts, on_input=self.weight_on_input)
        rows, dtype = Local().dispatch(x_GD, decision).finish()
        return rows, AllToAllTicket(dtype, self.travelling.route, self.by_token)


@final
@dataclass(frozen=True, slots=True)
class _Returned:
    travelling: Travelling
    by_token: ByToken
    dtype: torch.dtype

    def finish(self) -> Tensor:
        """A token adds its processes up in their order."""
        (y_SD,) = self.travelling.finish()
        return self.by_token.sum(y_SD).to(self.dtype)


def _decision(weights_GK: Tensor, expert_GK: Tensor, experts: int, *, on_input: bool) -> Routing:
    """The routing of rows that arrived, over the experts here; of scores nothing is known or asked."""
    used_GK = expert_GK != _ELSEWHERE
    unknown_GL = weights_GK.new_zeros(()).expand(weights_GK.shape[0], experts)
    return Routing(
        logits_TE=unknown_GL,
        scores_TE=unknown_GL,
        experts_TK=expert_GK.clamp_min(0),
        weights_TK=weights_GK,
        considered_TK=used_GK,
        wanted_TK=used_GK,
        keep_TK=used_GK,
        clean_TE=unknown_GL,
        weight_on_input=on_input,
    )
