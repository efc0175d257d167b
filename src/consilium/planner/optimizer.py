"""What an optimizer keeps of each tensor: the rule that training builds by and that memory is counted by."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from math import prod
from typing import Final

from consilium.config.model import Model
from consilium.config.optimizer import AdamW, BlockState, Muon, Optimizer, State
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
    sizes = ((name, prod(shape), is_hidden(name, len(shape))) for name, shape in shapes(model))
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
