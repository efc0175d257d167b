"""Rows of several tensors to where they belong, as one message, forward and backward.

A row's parts lie side by side in one buffer of bytes, so that a process sends one message to another and not
one a tensor. Two functions of autograd make one exchange: ``begin`` starts it and ``finish`` waits. In the
backward pass ``finish`` comes first and starts the way back, and ``begin`` waits: what was computed between
the two is computed while rows travel, in both directions.

Legend: S rows that leave, G rows that arrive, B bytes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from consilium.parallel.group import Exchange, Group


@final
@dataclass(frozen=True, slots=True)
class Route:
    """How many consecutive rows go to each process, and how many come from it."""

    group: Group
    name: str
    give: tuple[int, ...]
    take: tuple[int, ...]

    @staticmethod
    def of(group: Group, name: str, give: Sequence[int]) -> Route:
        """Asks the others what they give."""
        take = group.counts(torch.tensor(give)[:, None])
        return Route(group, name, tuple(give), tuple(take.flatten().tolist()))

    def back(self, name: str) -> Route:
        return Route(self.group, name, self.take, self.give)


@final
@dataclass(frozen=True, slots=True)
class Row:
    """What a row consists of: values and dtype of each part, widest first in the buffer."""

    sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Row:
        return Row(tuple(t.shape[1] for t in tensors), tuple(t.dtype for t in tensors))

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """uint8 [S, B]. A row begins where its widest part may begin."""
        packed_SB = torch.zeros(
            tensors[0].shape[0], self._stride(), dtype=torch.uint8, device=tensors[0].device
        )
        for tensor, part_Sb in zip(tensors, self._parts(packed_SB), strict=True):
            part_Sb.copy_(tensor)
        return packed_SB

    def unpack(self, packed_GB: Tensor) -> tuple[Tensor, ...]:
        """Views into the buffer."""
        return tuple(self._parts(packed_GB))

    def _parts(self, packed_SB: Tensor) -> list[Tensor]:
        starts = self._starts()
        return [
            packed_SB[:, start : start + size * dtype.itemsize].view(dtype)
            for start, size, dtype in zip(starts, self.sizes, self.dtypes, strict=True)
        ]

    def _starts(self) -> list[int]:
        order = sorted(range(len(self.sizes)), key=lambda i: -self.dtypes[i].itemsize)
        starts, end = [0] * len(order), 0
        for i in order:
            starts[i], end = end, end + self.sizes[i] * self.dtypes[i].itemsize
        return starts

    def _stride(self) -> int:
        """Bytes of a row, up to a whole number of its widest values."""
        used = sum(size * dtype.itemsize for size, dtype in zip(self.sizes, self.dtypes, strict=True))
        widest = max(dtype.itemsize for dtype in self.dtypes)
        return -(-used // widest) * widest


@final
@dataclass(slots=True)
class Travelling:
    """An exchange that has begun: rows of several tensors, each [S, ...], on the route."""

    route: Route
    row: Row
    back: str
    """What the gradients' way is called."""
    ticket: Tensor = field(default_factory=lambda: torch.empty(0))
    on_the_way: Exchange | None = None

    def finish(self) -> tuple[Tensor, ...]:
        """The rows that arrived; those that floats were sent as carry a gradient."""
        return _Finish.apply(self, self.ticket)


def begin(route: Route, tensors: Sequence[Tensor], *, back: str) -> Travelling:
    """Send rows [S, n] of ``tensors`` along ``route``; nobody waits before ``finish``."""
    travelling = Travelling(route, Row.of(tensors), back)
    travelling.ticket = _Begin.apply(travelling, *tensors)
    return travelling


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travelling: Travelling, *tensors: Tensor) -> Tensor:
        ctx.travelling = travelling
        ctx.floats = tuple(t.is_floating_point() for t in tensors)
        _send(travelling, travelling.route, travelling.row, tensors)
        # Floating point, or autograd would not connect the two halves.
        return torch.zeros(1, device=tensors[0].device)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        travelling: Travelling = ctx.travelling
        assert travelling.on_the_way is not None
        grads = iter(_gradient_row(travelling.row).unpack(travelling.on_the_way.wait()))
        travelling.on_the_way = None
        return None, *(next(grads) if is_float else None for is_float in ctx.floats)


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travelling: Travelling, ticket: Tensor) -> tuple[Tensor, ...]:
        ctx.travelling = travelling
        assert travelling.on_the_way is not None
        arrived = travelling.row.unpack(travelling.on_the_way.wait())
        travelling.on_the_way = None
        ctx.mark_non_differentiable(*(t for t in arrived if not t.is_floating_point()))
        return arrived

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        travelling: Travelling = ctx.travelling
        row = _gradient_row(travelling.row)
        floats = [g for g, dtype in zip(grads, travelling.row.dtypes, strict=True) if dtype.is_floating_point]
        _send(travelling, travelling.route.back(travelling.back), row, floats)
        return None, torch.zeros(1, device=floats[0].device)


def _gradient_row(row: Row) -> Row:
    kept = [i for i, dtype in enumerate(row.dtypes) if dtype.is_floating_point]
    return Row(tuple(row.sizes[i] for i in kept), tuple(row.dtypes[i] for i in kept))


def _send(travelling: Travelling, route: Route, row: Row, tensors: Sequence[Tensor]) -> None:
    packed_SB = row.pack(tensors)
    travelling.on_the_way = route.group.exchange(packed_SB, route.give, route.take, route.name)
