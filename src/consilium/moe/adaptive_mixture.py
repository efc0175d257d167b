"""The adaptive mixture of local experts of Jacobs, Jordan, Nowlan and Hinton (Neural Computation 3(1), 1991).

Legend: T cases, I inputs, O outputs, E experts.

Gate and experts have one layer each and read the same input. Nothing is selected: the gate is a router that
keeps every expert, so its decisions are recorded and drawn like any other's. The paper's idea is the error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from consilium.config.router import LinearGate, Raw, TopK
from consilium.config.router import Router as RouterConfig
from consilium.moe.routing.router import Router
from consilium.moe.types import LayerMode, Routing, Tokens

Unit = Literal["linear", "logistic"]


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
    """Experts of one layer under a softmax gate. ``weight`` [E, O, I] and ``bias`` [E, O] are the experts'.

    ``unit`` is what an output of an expert computes: "linear" for regression, "logistic" for targets in
    [0, 1]. Matrices are drawn from ``seed``, uniformly in [-1/2, 1/2], and biases are zero: experts that
    started equal under a gate of zeros would stay equal.
    """

    def __init__(
        self, inputs: int, outputs: int, experts: int, *, unit: Unit = "linear", seed: int = 0
    ) -> None:
        super().__init__()
        everyone = RouterConfig(projection=LinearGate(bias=True), select=TopK(k=experts), weight=Raw())
        self.router = Router(everyone, inputs, experts)
        self.weight = nn.Parameter(torch.zeros(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(experts, outputs))
        self.unit: Unit = unit
        self.reset(seed)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Start again from ``seed``, in place."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.uniform_(-0.5, 0.5, generator=generator)

    def forward(self, x_TI: Tensor, tokens: Tokens, mode: LayerMode) -> Opinions:
        """What gate and experts say of cases [T, I]. The gate computes in float32, experts as ``x_TI``."""
        drive_TEO = torch.einsum("ti,eoi->teo", x_TI, self.weight) + self.bias
        routing = self.router(x_TI, None, tokens, mode)
        match self.unit:
            case "linear":
                return Opinions(routing, drive_TEO)
            case "logistic":
                return Opinions(routing, drive_TEO.sigmoid())


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
