"""The routed experts: stacked weights and the choice of how their rows are computed."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from consilium.config.feed_forward import GATED, Activation
from consilium.config.moe import MoE
from consilium.moe.types import Activations, LayerMode
from consilium.ops.grouped import Backend, mixed_feed_forward, observed_feed_forward
from consilium.ops.rows import Rows
from consilium.ops.weights import Stack, stack_of


@final
class Experts(nn.Module):
    """E feed-forward networks over rows sorted by expert. Configured by ``consilium.config.moe.MoE``.

    E are those that live here, ``owned`` of all the layer's. Parameters: ``up`` [E, G, D] (G = 2F where
    gated: first F rows gate, last F up), ``down`` [E, D, F], D being the latent size where there is one.
    Created empty: the model initialises or loads them.
    """

    def __init__(
        self, config: MoE, hidden_size: int, owned: range | None = None, *, backend: Backend | None = None
    ) -> None:
        super().__init__()
        self.owned = range(config.experts) if owned is None else owned
        up_rows = config.width * (2 if config.activation in GATED else 1)
        size = config.expert_size(hidden_size)
        self.up = nn.Parameter(torch.empty(len(self.owned), up_rows, size))
        self.down = nn.Parameter(torch.empty(len(self.owned), size, config.width))
        self.register_buffer("up_scales", None)
        self.register_buffer("down_scales", None)
        self.up_scales: Tensor | None
        self.down_scales: Tensor | None
        self.size, self.width = size, config.width
        self.activation: Activation = config.activation
        self.backend: Backend | None = backend

    @property
    def up_stack(self) -> Stack:
        return stack_of(self.up, self.up_scales, self.size)

    @property
    def down_stack(self) -> Stack:
        return stack_of(self.down, self.down_scales, self.width)

    def forward(self, rows: Rows, mode: LayerMode) -> Tensor:
        """Each token's weighted sum [T, D] of the outputs of its rows, in at least float32."""
        up, down = self.up_stack, self.down_stack
        if mode.observer is None:
            return mixed_feed_forward(rows, up, down, self.activation, self.backend)
        x_RD = rows.inputs()
        hidden_RF, y_RD = observed_feed_forward(x_RD, rows.counts_E, up, down, self.activation)
        mode.observer.rows(rows, Activations(x_RD, hidden_RF, y_RD))
        return rows.outputs(y_RD)

    def extra_repr(self) -> str:
        experts_, rows, size = self.up.shape
        return f"experts={experts_}, up={rows}x{size}, activation={self.activation}, backend={self.backend}"
