"""An exponential average of the weights beside those that train."""

from __future__ import annotations

import dataclasses
from typing import final

import torch
from torch import Tensor

from consilium.checkpoint.store import Content
from consilium.config.optimizer import Average, Exponential, NoAverage
from consilium.config.training import is_frozen
from consilium.model.decoder import Decoder
from consilium.parallel.part import Sharding, Whole


@final
class Averaged:
    """Float32 averages of everything that moves: trained weights, selection biases, coefficients.

    Each process has those of what it has.
    """

    def __init__(
        self, model: Decoder, config: Average, frozen: tuple[str, ...], sharding: Sharding = Whole()
    ) -> None:
        self._config, self._sharding = config, sharding
        match config:
            case NoAverage():
                self._values: dict[str, Tensor] = {}
            case Exponential():
                self._values = {
                    name: sharding.part(value).here.detach().clone()
                    for name, value in model.state_dict().items()
                    if value.is_floating_point() and not is_frozen(name, frozen)
                }

    @torch.no_grad()
    def add(self, model: Decoder, step: int) -> None:
        """Count in the weights after ``step`` steps: the mean of all so far, until its memory is full."""
        match self._config:
            case NoAverage():
                return
            case Exponential(decay=decay):
                share = max(1 - decay, 1 / step)
                weights = model.state_dict()
                for name, value in self._values.items():
                    value.lerp_(self._sharding.part(weights[name]).here.to(value.dtype), share)

    def content(self, model: Decoder) -> Content | None:
        """The model of the averages, as views; None where there are none."""
        if not self._values:
            return None
        plain = Content.of(model)
        own = {name: self._sharding.like(plain.weights[name], here) for name, here in self._values.items()}
        return dataclasses.replace(plain, weights={**plain.weights, **own})
