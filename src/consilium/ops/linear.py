"""A linear map whose master weight keeps its own dtype while the arithmetic follows the input's."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from consilium.ops.weights import Matrix, matrix_of


@final
class Linear(nn.Module):
    """y = x W^T + b in the dtype of x; a float32 master weight is cast at each call.

    ``weight`` is [outputs, inputs] and left uninitialised: whoever builds the model initialises or loads it.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.inputs = inputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.register_buffer("weight_scales", None)
        self.weight_scales: Tensor | None
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    @property
    def matrix(self) -> Matrix:
        return matrix_of(self.weight, self.weight_scales, self.inputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix.times(x, self.bias)
