"""The latent space that routed experts may work in (LatentMoE, 2601.18089).

Legend: T tokens, D hidden size, L latent size.
"""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from consilium.config.moe import MoE
from consilium.ops.linear import Linear


@final
class Latent(nn.Module):
    """One projection before dispatch and one after combine, shared by all experts; identities without one.

    Rows that travel to experts are then D / L times smaller. Parameters: ``down.weight`` [L, D] and
    ``up.weight`` [D, L], without bias, so that a token without experts still gets zero.
    """

    def __init__(self, config: MoE, hidden_size: int) -> None:
        super().__init__()
        self.down: nn.Module = nn.Identity()
        self.up: nn.Module = nn.Identity()
        if config.latent is not None:
            self.down = Linear(hidden_size, config.latent)
            self.up = Linear(config.latent, hidden_size)

    def narrow(self, x_TD: Tensor) -> Tensor:
        """What experts read [T, L]."""
        return self.down(x_TD)

    def widen(self, y_TL: Tensor) -> Tensor:
        """What the weighted sum of the experts means in the hidden space [T, D]."""
        return self.up(y_TL)
