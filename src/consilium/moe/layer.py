"""The MoE layer: the same statements for every system.

Legend: T tokens, D hidden size, L latent size (D without one), R rows = kept (token, expert) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from consilium.config.moe import Capacity, MoE
from consilium.moe.admission import admit
from consilium.moe.balance import Balance
from consilium.moe.experts import Experts
from consilium.moe.latent import Latent
from consilium.moe.routing.fused import fused
from consilium.moe.routing.router import Router
from consilium.moe.shared import build_shared
from consilium.moe.transport import Local, Returning, Sending, Transports, local
from consilium.moe.types import LayerMode, Report, Routing, Tokens
from consilium.ops.native.library import Route


@dataclass(frozen=True, slots=True)
class Result:
    y_TD: Tensor
    routing: Routing
    """As admitted: what was used."""
    report: Report


@dataclass(frozen=True, slots=True)
class Going:
    """Rows on their way to the experts."""

    x_TD: Tensor
    routing: Routing
    """As admitted."""
    sending: Sending[Any]


@dataclass(frozen=True, slots=True)
class Coming:
    """Sums on their way back."""

    s_TD: Tensor
    """Of the shared experts."""
    returning: Returning


@final
class MoELayer(nn.Module):
    """Routed and shared experts over flat tokens. ``layer`` is its index in the model."""

    def __init__(self, config: MoE, hidden_size: int, layer: int, transports: Transports = local) -> None:
        super().__init__()
        self.admission = config.admission
        self.divisible = config.divisible
        self.layer = layer
        self.transport = transports(layer)
        self.router = Router(config.router, hidden_size, config.experts)
        self.latent = Latent(config, hidden_size)
        self.experts = Experts(config, hidden_size, self.transport.owned(config.experts))
        self.shared = build_shared(config, hidden_size)
        self.balance = Balance(config.balance, config.router, config.experts, layer)

    def forward(self, x_TD: Tensor, tokens: Tokens, mode: LayerMode) -> Result:
        """Outputs [T, D] without the residual, the routing as used, and the report with its losses."""
        going = self.send(x_TD, tokens, mode)
        coming = self.compute(going, mode)
        report = self.balance(going.routing, tokens, mode)
        y_TD = self.receive(coming)
        if mode.observer is not None:
            mode.observer.routing(going.routing, tokens)
        return Result(y_TD, going.routing, report)

    @property
    def whole(self) -> bool:
        """Whether all experts are here and read what the layer reads."""
        return isinstance(self.transport, Local) and isinstance(self.latent.down, nn.Identity)

    def fused(self) -> Route | None:
        """The rule of a step of decoding, where it is one that the native kernels know."""
        drops = isinstance(self.admission, Capacity) and self.admission.scope != "training"
        return None if drops else fused(self.router, self.balance.bias_E)

    def decide(self, x_TD: Tensor, tokens: Tokens, mode: LayerMode) -> Routing:
        """The routing as admitted."""
        return admit(self.router(x_TD, self.balance.bias_E, tokens, mode), tokens, self.admission, mode)

    def send(self, x_TD: Tensor, tokens: Tokens, mode: LayerMode) -> Going:
        """Decide, and send the rows on their way."""
        admitted = self.decide(x_TD, tokens, mode)
        return Going(x_TD, admitted, self.transport.dispatch(self.latent.narrow(x_TD), admitted))

    def compute(self, going: Going, mode: LayerMode) -> Coming:
        """Compute the shared experts while rows travel, then the routed ones, and send their sums back."""
        s_TD = self.shared(going.x_TD)
        rows, ticket = going.sending.finish()
        return Coming(s_TD, self.transport.combine(self.experts(rows, mode), ticket))

    def receive(self, coming: Coming) -> Tensor:
        """Wait for the sums [T, D]."""
        return self.latent.widen(coming.returning.finish()) + coming.s_TD
