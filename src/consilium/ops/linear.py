"""A linear map whose master weight keeps its own dtype while the arithmetic follows the input's."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional


@final
class Linear(nn.Module):
    """y = x W^T + b in the dtype of x; a float32 master weight is cast at each call.

    ``weight`` is [outputs, inputs] and left uninitialised: whoever builds the model initialises or loads it.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype), bias)
