"""Weights: a matrix is an object that multiplies itself, and nobody outside ``ops`` reads its tensors.

Modules hold the tensors under the names of their state dict and hand these values to what multiplies. Another
format is another final class here; kernels of ``ops`` that know a format match on it, everything else calls
``times``.

Legend: R rows, E experts, O outputs, I inputs, G groups of inputs, C bytes of a row of packed values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, Protocol, final

import torch
import torch.nn.functional as F
from torch import Tensor

from consilium.ops.bfloat16 import is_storage
from consilium.ops.native.library import NativeMatrix, native
from consilium.ops.native.operators import Held, product, serve

Packing = Literal["int8", "int4", "uint4", "fp8"]
BITS: Final[Mapping[Packing, float]] = MappingProxyType({"int8": 8.5, "int4": 4.5, "uint4": 5.0, "fp8": 8.25})
"""Of a weight, with its share of a scale."""
PACKINGS: Final[tuple[Packing, ...]] = tuple(BITS)
GROUP: Final = 32
"""Integers that share a scale."""
FLOAT8_GROUP: Final = 128
"""Floats in 8 bits that share one."""
_LARGEST: Final = torch.finfo(torch.float8_e4m3fn).max
_HIGHEST: Final = torch.finfo(torch.float16).max
_STEPS: Final[Mapping[Packing, int]] = MappingProxyType({"int8": 127, "int4": 8, "uint4": 15})
"""Of a scale, that make the largest value of a group."""
_LEAST: Final = 2.0**-20
"""A scale of which float16 rounds off about as much as integers in 8 bits do of their values."""
_AT_ONCE: Final = 2**18
"""Values that are packed at once."""


class Matrix(Protocol):
    """W [O, I]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def needs_gradient(self) -> bool:
        """Whether somebody asked for its gradient; a backward written by hand computes no other."""
        ...

    def times(self, x: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """The product x W^T + b [..., O] of rows [..., I], in the dtype of ``x`` and under autograd."""
        ...

    def wide(self, dtype: torch.dtype) -> Tensor:
        """The values [O, I]."""
        ...

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The values [..., I] of the rows ``ids`` [...]."""
        ...

    @property
    def held(self) -> Held | None:
        """What it is made of, for kernels; None where they have no such format."""
        ...

    def native(self, bias_O: Tensor | None = None) -> NativeMatrix | None:
        """The product as native kernels read it; None where they do not. Tensors have to stay alive."""
        ...


class Stack(Protocol):
    """A matrix of each expert, W [E, O, I]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def needs_gradient(self) -> bool: ...

    def matrices(self) -> tuple[Matrix, ...]:
        """The E matrices, taken apart once: indexing under autograd makes a full gradient an expert."""
        ...

    @property
    def held(self) -> Held | None: ...

    def native(self) -> NativeMatrix | None:
        """All matrices one below the other, as native kernels read them; None where they do not."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Dense:
    """A floating-point matrix. Wider than ``x`` (float32 masters) it is cast in the graph at each product."""

    weight_OI: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight_OI.shape)

    @property
    def needs_gradient(self) -> bool:
        return self.weight_OI.requires_grad

    def times(self, x: Tensor, bias_O: Tensor | None = None) -> Tensor:
        if not is_storage(x):
            return F.linear(x, self.wide(x.dtype), None if bias_O is None else bias_O.to(x.dtype))
        if serve(x, self.held, bias_O=bias_O):
            return product(x, *self.held[:2], bias_O, self.held.columns)
        wide_O = None if bias_O is None else bias_O.float()
        return F.linear(x.float(), self.wide(torch.float32), wide_O).to(x.dtype)

    def wide(self, dtype: torch.dtype) -> Tensor:
        return self.weight_OI.to(dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.weight_OI).to(dtype)

    @property
    def held(self) -> Held:
        return Held(self.weight_OI, None, self.weight_OI.shape[-1])

    def native(self, bias_O: Tensor | None = None) -> NativeMatrix | None:
        return native(self.weight_OI, self.shape, bias_O=bias_O)


@final
@dataclass(frozen=True, slots=True)
class DenseStack:
    """Floating-point matrices in one tensor."""

    weight_EOI: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight_EOI.shape)

    @property
    def needs_gradient(self) -> bool:
        return self.weight_EOI.requires_grad

    def matrices(self) -> tuple[Matrix, ...]:
        return tuple(Dense(weight_OI) for weight_OI in self.weight_EOI.unbind())

    @property
    def held(self) -> Held:
        return Held(self.weight_EOI, None, self.weight_EOI.shape[-1])

    def native(self) -> NativeMatrix | None:
        return native(self.weight_EOI, self.shape)


@final
@dataclass(frozen=True, slots=True)
class Packed:
    """Values in groups along the inputs, each with a scale: w = scale * value.

    Integers are in groups of 32, the last of which ends in zeros. int8 holds -127 to 127 as they are. int4
    holds -8 to 7 plus 8: of the 16 bytes of a group the lower halves are values 0 to 15 and the upper ones 16
    to 31. uint4 holds 0 to 15 in the same places, and behind the scales of a row the lowest value of each of
    its groups: w = scale * integer + lowest. The three are GGUF's Q8_0, Q4_0 and Q4_1 with the scales apart.
    Their scales are float16: a group whose largest value is below 1e-3 loses precision. fp8 holds floats
    (e4m3) in groups of 128, the last of which may be shorter, and scales in float32: a block of DeepSeek-V3
    (2412.19437 section 3.3) row by row.
    """

    codes_OC: Tensor
    """int8 [O, 32 G], uint8 [O, 16 G] or float8_e4m3fn [O, I]."""
    scales_OG: Tensor
    """float16 [O, G], of uint4 [O, 2 G]; float32 [O, G] of fp8."""
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes_OC.shape[0], self.columns

    @property
    def needs_gradient(self) -> bool:
        return False

    def times(self, x: Tensor, bias_O: Tensor | None = None) -> Tensor:
        if x.numel() == 0:  # an expert without rows: nothing is unpacked for it
            return x.new_empty(*x.shape[:-1], self.shape[0])
        if serve(x, self.held, bias_O=bias_O):
            return product(x, *self.held[:2], bias_O, self.columns)
        return F.linear(x, self.wide(x.dtype), None if bias_O is None else bias_O.to(x.dtype))

    def wide(self, dtype: torch.dtype) -> Tensor:
        return unpacked(self.codes_OC, self.scales_OG, self.columns).to(dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        # Indexing would wake torch's threads for a few rows, and they wait at work for milliseconds.
        codes, scales = (part.index_select(0, ids.flatten()) for part in (self.codes_OC, self.scales_OG))
        return unpacked(codes, scales, self.columns).to(dtype).unflatten(0, ids.shape)

    @property
    def held(self) -> Held:
        return Held(self.codes_OC, self.scales_OG, self.columns)

    def native(self, bias_O: Tensor | None = None) -> NativeMatrix | None:
        return native(self.codes_OC, self.shape, scales=self.scales_OG, bias_O=bias_O)


@final
@dataclass(frozen=True, slots=True)
class PackedStack:
    """Packed matrices in one tensor."""

    codes_EOC: Tensor
    scales_EOG: Tensor
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.codes_EOC.shape[:2], self.columns

    @property
    def needs_gradient(self) -> bool:
        return False

    def matrices(self) -> tuple[Matrix, ...]:
        pairs = zip(self.codes_EOC.unbind(), self.scales_EOG.unbind(), strict=True)
        return tuple(Packed(codes_OC, scales_OG, self.columns) for codes_OC, scales_OG in pairs)

    @property
    def held(self) -> Held:
        return Held(self.codes_EOC, self.scales_EOG, self.columns)

    def native(self) -> NativeMatrix | None:
        return native(self.codes_EOC, self.shape, scales=self.scales_EOG)


def matrix_of(weight: Tensor, scales: Tensor | None, columns: int) -> Matrix:
    """What a module holds as a matrix: packed where there are scales beside."""
    return Dense(weight) if scales is None else Packed(weight, scales, columns)


def stack_of(weight: Tensor, scales: Tensor | None, columns: int) -> Stack:
    return DenseStack(weight) if scales is None else PackedStack(weight, scales, columns)


def room(weight: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``weight`` [..., I], still to be written, on its device."""
    rows, columns = weight.shape[:-1], weight.shape[-1]
    groups = -(-columns // (FLOAT8_GROUP if packing == "fp8" else GROUP))
    match packing:
        case "int8":
            codes = weight.new_empty(*rows, groups * GROUP, dtype=torch.int8)
        case "int4":
            codes = weight.new_empty(*rows, groups * GROUP // 2, dtype=torch.uint8)
        case "uint4":
            codes, groups = weight.new_empty(*rows, groups * GROUP // 2, dtype=torch.uint8), 2 * groups
        case "fp8":
            codes = weight.new_empty(*rows, columns, dtype=torch.float8_e4m3fn)
            return codes, weight.new_empty(*rows, groups, dtype=torch.float32)
    return codes, weight.new_empty(*rows, groups, dtype=torch.float16)


def packed(weight: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix or a stack [..., I]: the nearest, by groups.

    int8: the scale takes the largest to 127 (GGUF's Q8_0). int4: it takes the value that is largest, with its
    sign, to -8, since there is one more integer below zero than above (Q4_0). uint4: it takes what is between
    the lowest and the largest to 15 (Q4_1). fp8: it takes the largest to 448. The scale is rounded first.
    """
    codes, scales = room(weight, packing)
    pack_into(weight, packing, codes, scales)
    return codes, scales


def pack_into(weight: Tensor, packing: Packing, codes: Tensor, scales: Tensor) -> None:
    """``packed`` into its room, some rows at a time: beside it memory holds a few megabytes."""
    rows = (part.flatten(0, -2) for part in (weight, codes, scales))
    at_once = max(1, _AT_ONCE // max(weight.shape[-1], 1))
    for piece, *into in zip(*(part.split(at_once) for part in rows), strict=True):
        for target, values in zip(into, _packed(piece, packing), strict=True):
            target.copy_(values)


def _packed(weight: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    size = FLOAT8_GROUP if packing == "fp8" else GROUP
    groups = F.pad(weight.float(), (0, -weight.shape[-1] % size)).unflatten(-1, (-1, size))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    match packing:
        case "int8":
            scales = (largest.abs() / 127).half()
            codes = _shares(groups, scales).round().clamp(-127, 127).to(torch.int8)
        case "int4":
            scales = (largest / -8).half()
            codes = halves_of(_shares(groups, scales).round().clamp(-8, 7).add(8).to(torch.uint8))
        case "uint4":
            lowest = groups.amin(-1, keepdim=True).clamp(-_HIGHEST, _HIGHEST).half()
            scales = ((groups.amax(-1, keepdim=True) - lowest.float()) / 15).half()
            shares = _shares(groups - lowest.float(), scales)
            codes = halves_of(shares.round().clamp(0, 15).to(torch.uint8))
            scales = torch.cat((scales, lowest), -2)
        case "fp8":
            scales = largest.abs() / _LARGEST
            codes = _shares(groups, scales).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
            return codes.flatten(-2)[..., : weight.shape[-1]], scales.squeeze(-1)
    return codes.flatten(-2), scales.squeeze(-1)


def range_of(packing: Packing) -> tuple[float, float]:
    """Between what the largest value of a matrix has to be, if it is not 0.

    Scales in float16 hold no larger ones, and of smaller ones too little.
    """
    if packing == "fp8":
        return 0.0, torch.finfo(torch.float32).max
    steps = _STEPS[packing]
    return steps * _LEAST, _HIGHEST if packing == "uint4" else steps * _HIGHEST


def largest_of(weight: Tensor) -> float:
    """The largest absolute value, without a copy of all."""
    return max(abs(float(end)) for end in weight.aminmax())


def halves_of(integers: Tensor) -> Tensor:
    """Bytes [..., 16] of groups of 32 integers from 0 to 15."""
    low, high = integers.chunk(2, -1)
    return low | high << 4


def _shares(groups: Tensor, scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, groups / scales.float())


def unpacked(codes: Tensor, scales: Tensor, columns: int) -> Tensor:
    """Float32 values [..., I] of packed ones."""
    if codes.is_floating_point():
        return codes.float() * scales.float().repeat_interleave(FLOAT8_GROUP, -1)[..., :columns]
    kind = packing_of(codes, scales)
    groups = codes.unflatten(-1, (-1, GROUP if kind == "int8" else GROUP // 2))
    if kind != "int8":
        groups = torch.cat((groups & 15, groups >> 4), -1)
    if kind == "int4":
        groups = groups.to(torch.int8) - 8
    scale, *lowest = scales.float()[..., None].split(groups.shape[-2], -2)
    values = groups * scale
    return (values + lowest[0] if lowest else values).flatten(-2)[..., :columns]


def packing_of(codes: Tensor, scales: Tensor) -> Packing:
    """What these were packed into."""
    if codes.is_floating_point():
        return "fp8"
    if codes.dtype == torch.int8:
        return "int8"
    return "uint4" if scales.shape[-1] * GROUP // 4 == codes.shape[-1] else "int4"
