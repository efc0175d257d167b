"""Shared experts: what every token visits beside its routed experts.

Legend: T tokens, D hidden size, F width of all shared experts together.
"""

from __future__ import annotations

from typing import assert_never, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilium.config.feed_forward import GATED, Activation
from consilium.config.moe import AlwaysOn, MoE, NoShared, SigmoidGated
from consilium.config.moe import Shared as SharedConfig
from consilium.ops.feed_forward import feed_forward


@final
class Shared(nn.Module):
    """Adds the shared experts' output to the routed one. Parts are absent where the system has none.

    Parameters as in a feed-forward block: ``up.weight`` [G, D], ``down.weight`` [D, F]; ``gate.weight``
    [1, D] where one sigmoid a token scales the sum (Qwen1.5-MoE). The model initialises or loads them.
    """

    def __init__(self, config: MoE, hidden_size: int) -> None:
        super().__init__()
        self.kind: SharedConfig = config.shared
        self.activation: Activation = config.activation
        width = config.shared_width
        match config.shared:
            case NoShared():
                return
            case AlwaysOn():
                pass
            case SigmoidGated():
                self.gate = nn.Linear(hidden_size, 1, bias=False)
            case _:
                assert_never(config.shared)
        self.up = nn.Linear(hidden_size, width * (2 if config.activation in GATED else 1), bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """The sum [T, D] of the routed output and the shared experts' of ``x_TD``."""
        match self.kind:
            case NoShared():
                return routed_TD
            case AlwaysOn():
                return routed_TD + feed_forward(x_TD, self.up.weight, self.down.weight, self.activation)
            case SigmoidGated():
                y_TD = feed_forward(x_TD, self.up.weight, self.down.weight, self.activation)
                return routed_TD + (self._share(x_TD) * y_TD).to(y_TD.dtype)

    def _share(self, x_TD: Tensor) -> Tensor:
        """Float32 [T, 1], as all gates."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return torch.sigmoid(F.linear(x_TD.float(), self.gate.weight.float()))
