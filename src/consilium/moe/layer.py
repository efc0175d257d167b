"""The MoE layer: the same statements for every system.

Legend: T tokens, D hidden size, L latent size (D without one), R rows = kept (token, expert) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from consilium.config.moe import MoE
from consilium.moe.admission import admit
from consilium.moe.balance import Balance
from consilium.moe.experts import Experts
from consilium.moe.latent import Latent
from consilium.moe.routing.router import Router
from consilium.moe.shared import build_shared
from consilium.moe.transport import Local, Transport
from consilium.moe.types import Mode, Report, Routing, Tokens


@dataclass(frozen=True, slots=True)
class Result:
    y_TD: Tensor
    routing: Routing
    """As admitted: what was used."""
    report: Report


@final
class MoELayer(nn.Module):
    """Routed and shared experts over flat tokens. ``layer`` is its index in the model, told to observers."""

    def __init__(self, config: MoE, hidden_size: int, layer: int, transport: Transport | None = None) -> None:
        super().__init__()
        self.admission = config.admission
        self.layer = layer
        self.transport: Transport = Local() if transport is None else transport
        self.router = Router(config.router, hidden_size, config.experts)
        self.latent = Latent(config, hidden_size)
        self.experts = Experts(config, hidden_size)
        self.shared = build_shared(config, hidden_size)
        self.balance = Balance(config.balance, config.router, config.experts)

    def forward(self, x_TD: Tensor, tokens: Tokens, mode: Mode) -> Result:
        """Outputs [T, D] without the residual, the routing as used, and the report with its losses."""
        mode = mode.at(self.layer)
        routing = self.router(x_TD, self.balance.bias_E, tokens, mode)
        admitted = admit(routing, tokens, self.admission, mode)
        rows, ticket = self.transport.dispatch(self.latent.narrow(x_TD), admitted)
        y_RL = self.experts(rows, self.layer, mode)
        y_TD = self.latent.widen(self.transport.combine(y_RL, ticket)) + self.shared(x_TD)
        report = self.balance(routing, admitted, tokens, self.layer, mode)
        if mode.observer is not None:
            mode.observer.routing(self.layer, admitted, tokens)
        return Result(y_TD, admitted, report)
