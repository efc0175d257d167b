"""Shared experts: what every token visits beside its routed experts, computed while rows travel.

Legend: T tokens, D hidden size, F width of all shared experts together.
"""

from __future__ import annotations

from typing import assert_never, final

import torch
from torch import Tensor, nn

from consilium.config.feed_forward import Activation, matrices
from consilium.config.moe import AlwaysOn, MoE, NoShared, SigmoidGated
from consilium.ops.exact import exact_linear, no_autocast
from consilium.ops.feed_forward import DenseNetwork, activate
from consilium.ops.linear import Linear


def build_shared(config: MoE, hidden_size: int) -> nn.Module:
    """What maps ``x_TD`` to the shared experts' output ``s_TD``, which the layer adds to the routed one.

    Parameters: ``up.weight`` [G, D] and ``down.weight`` [D, F]; ``gate.weight`` [1, D] where gated.
    """
    match config.shared:
        case NoShared():
            return Nobody()
        case AlwaysOn():
            return DenseNetwork(hidden_size, config.shared_width, config.activation)
        case SigmoidGated():
            return GatedNetwork(hidden_size, config.shared_width, config.activation)
        case _:
            assert_never(config.shared)


@final
class Nobody(nn.Module):
    """Zeros, of which only one is held."""

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD.new_zeros(()).expand_as(x_TD)


@final
class GatedNetwork(nn.Module):
    """One sigmoid a token scales the network (Qwen1.5-MoE)."""

    def __init__(self, hidden_size: int, width: int, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate = Linear(hidden_size, 1)
        self.up = Linear(hidden_size, (matrices(activation) - 1) * width)
        self.down = Linear(width, hidden_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD = self.down(activate(self.up(x_TD), self.activation))
        return (self._share(x_TD) * y_TD).to(y_TD.dtype)

    def _share(self, x_TD: Tensor) -> Tensor:
        """Float32 [T, 1], as all gates."""
        with no_autocast(x_TD):
            return torch.sigmoid(exact_linear(x_TD.float(), self.gate.weight.float()))
