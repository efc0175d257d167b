"""Bytes that a training run holds, by what it keeps; and the rule by which training builds its optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Final

from consilium.config.model import Model
from consilium.config.optimizer import AdamW, BlockState, Exponential, Muon, Optimizer, State
from consilium.config.training import Training, is_frozen
from consilium.planner.memory import FLOAT32, MOMENTS
from consilium.planner.shapes import shapes

_OTHERS: Final = ("embed.weight", "head.weight", "*router.*", "*shared.gate.weight")


def is_hidden(name: str, dimensions: int) -> bool:
    """Whether a tensor is a hidden matrix or a stack of them: no embedding, head, router, norm or bias."""
    return dimensions > 1 and not any(fnmatchcase(name, pattern) for pattern in _OTHERS)


def is_router(name: str) -> bool:
    return fnmatchcase(name, "*router.*")


def state_bytes(
    model: Model, optimizer: Optimizer, *, trains: Callable[[str], bool] = lambda name: True
) -> int:
    """Bytes of the optimizer's state, MTP included; ``trains`` says which tensors have one."""
    sizes = ((name, math.prod(shape), is_hidden(name, len(shape))) for name, shape in shapes(model))
    return sum(_bytes(optimizer, size, hidden=hidden) for name, size, hidden in sizes if trains(name))


def in_blocks(state: State, size: int, *, hidden: bool) -> bool:
    """Whether the moments of a tensor of ``size`` values are kept in 8 bits."""
    return isinstance(state, BlockState) and hidden and size >= state.smallest


def _bytes(optimizer: Optimizer, size: int, *, hidden: bool) -> int:
    match optimizer:
        case AdamW(state=BlockState() as state) if in_blocks(state, size, hidden=hidden):
            return 2 * (size + FLOAT32 * -(-size // state.block))
        case Muon() if hidden:
            return FLOAT32 * size
        case _:
            return MOMENTS * size


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
