"""Bytes that a training run holds, by what it keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from consilium.config.optimizer import Exponential
from consilium.config.training import Training, is_frozen
from consilium.planner.memory import FLOAT32
from consilium.planner.optimizer import state_bytes
from consilium.planner.shapes import shapes


@dataclass(frozen=True, slots=True)
class RunMemory:
    """Bytes that a training run holds from first to last step, MTP included; activations come on top."""

    weights: int
    gradients: int
    optimizer: int
    average: int = 0
    copy: int = 0
    """Of what is being saved, while a run trains on."""

    @property
    def checkpoint(self) -> int:
        """What it saves to go on from."""
        return self.weights + self.optimizer + self.average

    @property
    def total(self) -> int:
        return self.checkpoint + self.gradients + self.copy


def run_memory(config: Training) -> RunMemory:
    """Count what ``config`` keeps: a frozen part has weights alone."""

    def trains(name: str) -> bool:
        return not is_frozen(name, config.freeze)

    sizes = {name: FLOAT32 * math.prod(shape) for name, shape in shapes(config.model)}
    trained = sum(size for name, size in sizes.items() if trains(name))
    held = RunMemory(
        weights=sum(sizes.values()),
        gradients=trained,
        optimizer=state_bytes(config.model, config.optimizer, trains=trains),
        average=trained * isinstance(config.average, Exponential),
    )
    match config.saving:
        case "blocking":
            return held
        case "background":
            return replace(held, copy=held.checkpoint)
