"""The products of training by the kernels: matrices and gradients are read and written as wide as they are.

Legend: P rows sorted by expert, E experts, O outputs and I inputs of one matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final, final

import torch
from torch import Tensor

from consilium.ops.constant import constant
from consilium.ops.native.compile import Missing, Tier, planned
from consilium.ops.native.library import TYPES, Sorted, kernels, readable

_TIMES_TRANSPOSED, _TIMES, _OUTER = range(3)
_FASTER: Final[tuple[Tier, ...]] = ("avx2", "avx512bf16")
"""Tiers whose products are faster than torch's (docs/decisions/0003-experts-backend.md)."""
_SIDE: Final = 512
"""Sides of a matrix of float32 from which they are: below it whoever multiplies stays in the caches."""
_ROWS: Final = 32
"""Rows of an expert from which they are: a matrix is packed for however few."""


def trains(x_PD: Tensor, *matrices_EOI: Tensor) -> bool:
    """Whether the kernels are here and read these."""
    return all(readable(tensor) for tensor in (x_PD, *matrices_EOI)) and _tier() is not None


def trains_faster(x_PD: Tensor, counts_E: Sequence[int], *matrices_EOI: Tensor) -> bool:
    """Whether they do so faster than torch. Nothing is compiled to answer no."""
    narrow = x_PD.dtype == torch.bfloat16
    least = min(side for tensor in matrices_EOI for side in tensor.shape[1:])
    if not narrow and (x_PD.dtype != torch.float32 or least < _SIDE):
        return False
    planned = _planned()
    emulated = narrow and planned == "avx2"  # there torch has nothing but a loop for bfloat16
    busy = sum(counts_E) >= _ROWS * sum(count > 0 for count in counts_E)
    return planned in _FASTER and (busy or emulated) and trains(x_PD, *matrices_EOI)


@constant
def _planned() -> Tier | None:
    """The tier of the kernels that are here or would be compiled."""
    return _plan()


@functools.cache
def _plan() -> Tier | None:
    found = planned()
    return None if isinstance(found, Missing) else found.tier


@constant
def _tier() -> Tier | None:
    found = kernels()
    return None if found is None else found.tier


@final
class Native:
    """Rows as they are, matrices in their own dtype; pairs of bfloat16 are summed in float32."""

    def __init__(self, counts_E: Sequence[int], *, wide: bool) -> None:
        self.ends_E = torch.tensor(counts_E, device="cpu").cumsum(0)
        self.wide = wide

    def enter(self, x_RI: Tensor) -> Tensor:
        return x_RI.contiguous()

    def leave(self, x_PI: Tensor) -> Tensor:
        return x_PI

    def times_transposed(self, x_PI: Tensor, w_EOI: Tensor) -> Tensor:
        return multiply_sorted(x_PI, w_EOI, self.ends_E, _TIMES_TRANSPOSED, wide=False)

    def times(self, grad_PO: Tensor, w_EOI: Tensor) -> Tensor:
        return multiply_sorted(grad_PO, w_EOI, self.ends_E, _TIMES, wide=False)

    def outer(self, grad_PO: Tensor, x_PI: Tensor) -> Tensor:
        return multiply_sorted(grad_PO, x_PI, self.ends_E, _OUTER, wide=self.wide)


@torch.library.custom_op("consilium::sorted", mutates_args=(), device_types="cpu")
def multiply_sorted(
    rows: Tensor,
    other: Tensor,
    ends_E: Tensor,
    kind: int,
    wide: bool,  # noqa: FBT001 - a schema
) -> Tensor:
    """The product of ``kind`` (source/train.h), in the dtype of ``rows`` or, ``wide``, in float32."""
    found = kernels()
    assert found is not None, "who asks has seen that kernels are here"
    out = _empty(rows, other, ends_E, kind, wide)
    outputs, inputs = _sizes(rows, other, kind)
    call = Sorted(
        *(kind, len(ends_E), outputs, inputs),
        *(TYPES[tensor.dtype] for tensor in (rows, other, out)),
        *(tensor.data_ptr() for tensor in (ends_E, rows, other, out)),
    )
    found.sorted(call)
    return out


@multiply_sorted.register_fake
def _empty(
    rows: Tensor,
    other: Tensor,
    ends_E: Tensor,
    kind: int,
    wide: bool,  # noqa: FBT001 - the same
) -> Tensor:
    outputs, inputs = _sizes(rows, other, kind)
    shapes = (len(rows), outputs), (len(rows), inputs), (len(ends_E), outputs, inputs)
    return rows.new_empty(shapes[kind], dtype=torch.float32 if wide else rows.dtype)


def _sizes(rows: Tensor, other: Tensor, kind: int) -> tuple[int, int]:
    """Outputs and inputs of a matrix."""
    return (rows.shape[1], other.shape[1]) if kind == _OUTER else (other.shape[1], other.shape[2])
