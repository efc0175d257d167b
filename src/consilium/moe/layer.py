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
from consilium.moe.transport import Transports, local
from consilium.moe.types import LayerMode, Report, Routing, Tokens


@dataclass(frozen=True, slots=True)
class Result:
    y_TD: Tensor
    routing: Routing
    """As admitted: what was used."""
    report: Report


@final
class MoELayer(nn.Module):
    """Routed and shared experts over flat tokens. ``layer`` is its index in the model."""

    def __init__(self, config: MoE, hidden_size: int, layer: int, transports: Transports = local) -> None:
        super().__init__()
        self.admission = config.admission
        self.layer = layer
        self.transport = transports(layer)
        self.router = Router(config.router, hidden_size, config.experts)
        self.latent = Latent(config, hidden_size)
        self.experts = Experts(config, hidden_size, self.transport.owned(config.experts))
        self.shared = build_shared(config, hidden_size)
        self.balance = Balance(config.balance, config.router, config.experts, layer)

    def forward(self, x_TD: Tensor, tokens: Tokens, mode: LayerMode) -> Result:
        """Outputs [T, D] without the residual, the routing as used, and the report with its losses."""
        routing = self.router(x_TD, self.balance.bias_E, tokens, mode)
        admitted = admit(routing, tokens, self.admission, mode)
        sending = self.transport.dispatch(self.latent.narrow(x_TD), admitted)
        s_TD = self.shared(x_TD)
        rows, ticket = sending.finish()
        returning = self.transport.combine(self.experts(rows, mode), ticket)
        report = self.balance(admitted, tokens, mode)
        y_TD = self.latent.widen(returning.finish()) + s_TD
        if mode.observer is not None:
            mode.observer.routing(admitted, tokens)
        return Result(y_TD, admitted, report)
