"""The adaptive mixture of local experts of Jacobs, Jordan, Nowlan and Hinton (Neural Computation 3(1), 1991).

Legend: T cases, I inputs, O outputs, E experts.

Gate and experts are linear maps of the same input. Nothing is selected: the gate is a router that keeps every
expert, so its decisions are recorded and drawn like any other's. The paper's idea is the error function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from consilium.config.router import LinearGate, Raw, TopK
from consilium.config.router import Router as RouterConfig
from consilium.moe.router import Router
from consilium.moe.types import Mode, Routing, Tokens


@dataclass(frozen=True, slots=True)
class Opinions:
    routing: Routing
    output_TEO: Tensor
    """What each expert says, unweighted."""

    @property
    def blend_TO(self) -> Tensor:
        """Float32 [T, O]: the outputs averaged by the gate's probabilities."""
        return torch.einsum("te,teo->to", self.routing.scores_TE, self.output_TEO.float())


@final
class AdaptiveMixture(nn.Module):
    """Linear experts under a softmax gate. ``weight`` [E, O, I] and ``bias`` [E, O] are the experts'."""

    def __init__(self, inputs: int, outputs: int, experts: int) -> None:
        super().__init__()
        everyone = RouterConfig(projection=LinearGate(bias=True), select=TopK(k=experts), weight=Raw())
        self.router = Router(everyone, inputs, experts)
        self.weight = nn.Parameter(torch.zeros(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(experts, outputs))

    def forward(self, x_TI: Tensor, tokens: Tokens, mode: Mode) -> Opinions:
        routing = self.router(x_TI, None, tokens, mode)
        return Opinions(routing, torch.einsum("ti,eoi->teo", x_TI, self.weight) + self.bias)


def cooperative_error(logits_TE: Tensor, output_TEO: Tensor, target_TO: Tensor) -> Tensor:
    """Mean of |d - sum p_i o_i|^2: every expert answers for the residual of the blend (equation 1.1)."""
    blend_TO = torch.einsum("te,teo->to", logits_TE.softmax(dim=1), output_TEO)
    return (target_TO - blend_TO).square().sum(dim=1).mean()


def competitive_error(logits_TE: Tensor, output_TEO: Tensor, target_TO: Tensor) -> Tensor:
    """Mean of sum p_i |d - o_i|^2: each expert answers for a whole case of its own (equation 1.2)."""
    return (logits_TE.softmax(dim=1) * _squared_distance(output_TEO, target_TO)).sum(dim=1).mean()


def log_likelihood_error(logits_TE: Tensor, output_TEO: Tensor, target_TO: Tensor) -> Tensor:
    """Mean of -log sum p_i exp(-|d - o_i|^2 / 2), the form the paper trains with (equation 1.3).

    Scaled by the posterior instead of the prior, the expert that fits a case best learns it fastest.
    """
    log_joint_TE = logits_TE.log_softmax(dim=1) - _squared_distance(output_TEO, target_TO) / 2
    return -log_joint_TE.logsumexp(dim=1).mean()


def _squared_distance(output_TEO: Tensor, target_TO: Tensor) -> Tensor:
    return (target_TO[:, None, :] - output_TEO).square().sum(dim=2)
