"""Muon over stacks of matrices: one batched Newton-Schulz a parameter, each expert its own matrix.

Legend: P matrices of one parameter, M rows, N columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from consilium.config.optimizer import Muon
from consilium.ops.orthogonal import orthogonalised
from consilium.parallel.part import Sharding, Whole

MOMENTUM = "momentum"


@final
class StackedMuon(torch.optim.Optimizer):
    """Momentum, made orthogonal a matrix at a time, scaled to the size of an AdamW update (2502.16982 eq. 4).

    A group's ``parts`` says of how many matrices, one above the other, the last two dimensions of its
    parameters are made: gate and up of a gated network are two. The size of an update does not depend on
    that of the gradient: an expert that is idle goes on along its old momentum until it is chosen again.

    Over processes a stack is cut between matrices, and each process moves those that it has. A matrix of
    which it has rows is put together, for the time of its update, by all who have some: ``layouts`` says how
    each parameter lies over the processes of ``sharding``.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        config: Muon,
        layouts: Mapping[Tensor, Tensor] = MappingProxyType({}),
        sharding: Sharding = Whole(),
    ) -> None:
        super().__init__([dict(group) for group in groups], {"lr": config.learning_rate})
        self._config, self._layouts, self._sharding = config, layouts, sharding
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
        whole, own = self._whole(weight, direction)
        rows, columns = whole.shape[-2] // group["parts"], whole.shape[-1]
        update_PMN = orthogonalised(
            whole.reshape(-1, rows, columns), iterations=config.iterations, products=self._products
        )
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * config.rms * max(rows, columns) ** 0.5
        weight.add_(update_PMN.view_as(whole)[own.start : own.stop], alpha=-rate)

    def _whole(self, weight: Tensor, direction: Tensor) -> tuple[Tensor, range]:
        """``direction`` in whole matrices, and which of its rows, or matrices of a stack, are here."""
        layout = self._layouts.get(weight, weight)
        if weight.ndim > 2:
            return direction, range(weight.shape[0])
        whole = self._sharding.gathered(self._sharding.like(layout, direction))
        return whole, self._sharding.part(layout).rows
