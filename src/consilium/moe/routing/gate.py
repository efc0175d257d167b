"""Gates: from token vectors to logits, and the learned noise on top of them.

Legend: T tokens, D hidden size, N outputs of a gate (experts or groups of experts), G groups, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilium.moe.types import LayerMode
from consilium.ops.exact import exact_linear
from consilium.ops.weights import Dense, Matrix

_OUTPUTS: Final = 16
_TOKENS: Final = 8
"""Products of so many outputs, or a multiple, and at least so many tokens sum each element in one order."""


@final
class Gate(nn.Module):
    """A linear map computed in full float32 whatever dtype its parameters and input have.

    A gate in bfloat16 sends 0.3 % (8 experts) to 4.0 % (256 experts in groups) of random tokens elsewhere, as
    docs/conformance.md measures; megablocks and vLLM both shipped one. Equal rows of the weight give logits
    that are equal to the last bit, on which virtual groups (2410.07524 section 3.2) choose together.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    @property
    def matrix(self) -> Matrix:
        return Dense(self.weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        tokens, outputs = x_TD.shape[0], self.weight.shape[0]
        x_TD = _with_rows(x_TD, max(_TOKENS - tokens, 0))
        weight_ND = _with_rows(self.weight.float(), -outputs % _OUTPUTS)
        logits_TN = exact_linear(x_TD, weight_ND)
        if logits_TN.shape != (tokens, outputs):
            logits_TN = logits_TN[:tokens, :outputs].clone()  # no view: FSDP2 hooks what a block returns
        return logits_TN if self.bias is None else logits_TN + self.bias.float()


def _with_rows(x: Tensor, more: int) -> Tensor:
    return F.pad(x, (0, 0, 0, more)) if more else x


@final
class TanhGate(nn.Module):
    """tanh(x W1) W2, both without bias (LLaMA-MoE)."""

    def __init__(self, inputs: int, experts: int) -> None:
        super().__init__()
        self.hidden = Gate(inputs, experts)
        self.output = Gate(experts, experts)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.output(torch.tanh(self.hidden(x_TD)))


@final
class ZeroGate(nn.Module):
    """Logits of zero without parameters, for routers that decide by token id alone."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD.new_zeros(x_TD.shape[0], self.experts)


@dataclass(frozen=True, slots=True)
class Level:
    """What one gate says of each token."""

    clean_TN: Tensor
    noisy_TN: Tensor
    """The clean logits themselves where there is no noise."""
    deviation_TN: Tensor | None = None
    """Standard deviation of the learned noise."""


def level(gate: nn.Module, noise: nn.Module | None, floor: float, x_TD: Tensor, mode: LayerMode) -> Level:
    """Logits and, in training, learned noise N(0, 1) * (softplus(x W_noise) + floor) (Shazeer 2017 eq. 4)."""
    clean_TN = gate(x_TD)
    if noise is None:
        return Level(clean_TN, clean_TN)
    deviation_TN = F.softplus(noise(x_TD)) + floor
    if not mode.training:
        return Level(clean_TN, clean_TN, deviation_TN)
    normal_TN = torch.empty_like(clean_TN).normal_(generator=mode.generator)
    return Level(clean_TN, clean_TN + normal_TN * deviation_TN, deviation_TN)


def joint(primary_TG: Tensor, secondary_TE: Tensor) -> Tensor:
    """Log-probabilities [T, E] of a group and then of an expert in it: softmax gives their product."""
    within_TGN = secondary_TE.unflatten(1, (primary_TG.shape[1], -1)).log_softmax(dim=2)
    return (primary_TG.log_softmax(dim=1)[:, :, None] + within_TGN).flatten(1)
