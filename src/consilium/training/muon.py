"""Muon over stacks of matrices: one batched Newton-Schulz a parameter, each expert its own matrix.

Legend: P matrices of one parameter, M rows, N columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from consilium.config.optimizer import Muon
from consilium.ops.orthogonal import orthogonalised

MOMENTUM = "momentum"


@final
class StackedMuon(torch.optim.Optimizer):
    """Momentum, made orthogonal a matrix at a time, scaled to the size of an AdamW update (2502.16982 eq. 4).

    A group's ``parts`` says of how many matrices, one above the other, the last two dimensions of its
    parameters are made: gate and up of a gated network are two. The size of an update does not depend on
    that of the gradient: an expert that is idle goes on along its old momentum until it is chosen again.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]], config: Muon) -> None:
        super().__init__([dict(group) for group in groups], {"lr": config.learning_rate})
        self._config = config
        self._products = torch.bfloat16 if config.products == "bfloat16" else torch.float32

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the gradients are there"
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: Tensor, group: Mapping[str, Any]) -> None:
        config, state, gradient = self._config, self.state[weight], weight.grad
        assert gradient is not None
        if not state:
            state[MOMENTUM] = torch.zeros_like(weight)
        momentum = state[MOMENTUM].lerp_(gradient, 1 - config.momentum)
        direction = gradient.lerp(momentum, config.momentum) if config.nesterov else momentum
        rows, columns = weight.shape[-2] // group["parts"], weight.shape[-1]
        update_PMN = orthogonalised(
            direction.reshape(-1, rows, columns), iterations=config.iterations, products=self._products
        )
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update_PMN.view_as(weight), alpha=-group["lr"] * config.rms * max(rows, columns) ** 0.5)
