"""What the compiled kernels are called with: the structures of source/layers.h, field by field.

Legend: O outputs, I inputs, E experts, B rows.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from ctypes import Array, Structure, c_double, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, final

import torch
from torch import Tensor

from consilium.config.feed_forward import Activation
from consilium.ops.native.compile import Built, Missing, Tier, built, built_alone

TYPES: Final[Mapping[torch.dtype, int]] = MappingProxyType({torch.float32: 0, torch.bfloat16: 1})
"""Formats that the kernels read, by their number there."""
SCALED: Final[Mapping[torch.dtype, tuple[int, torch.dtype]]] = MappingProxyType(
    {
        torch.int8: (2, torch.float16),
        torch.uint8: (3, torch.float16),
        torch.float8_e4m3fn: (4, torch.float32),
    }
)
"""The same of packed ones, and the dtype of their scales."""
_WITH_LOWEST: Final = 5
"""Of integers in 4 bits with two values in float16 for a group, 16 bytes."""
CACHES: Final[Mapping[torch.dtype, int]] = MappingProxyType({**TYPES, torch.int8: 2})
"""The same of cached rows: integers are latents in 8 bits (source/latents.h)."""
MANY: Final = 16
"""Rows from which products count as those of a prompt."""
ACTIVATIONS: Final[Mapping[Activation, int]] = MappingProxyType(
    {"swiglu": 0, "geglu": 1, "gelu": 2, "relu": 3, "squared_relu": 4}
)


class NativeMatrix(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("data", "scales", "bias")),
        *((name, c_int64) for name in ("rows", "columns", "type", "bias_type")),
    )


class NativeNorm(Structure):
    _fields_ = (("weight", c_void_p), ("type", c_int64), ("epsilon", c_double))


class Attend(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("heads", "kv_heads", "key", "nope", "pairs", "value", "rank")),
        *((name, c_int64) for name in ("interleaved", "norm_each", "window")),
        *((name, c_double) for name in ("scale", "softcap")),
        *((name, NativeMatrix) for name in ("query", "query_up", "keys", "values", "latent_up", "output")),
        *((name, NativeNorm) for name in ("norm", "query_norm", "key_norm", "post_norm", "next_norm")),
        *((name, c_void_p) for name in ("storage", "table")),
        *((name, c_int64) for name in ("table_width", "page", "row", "slots", "cache_type")),
    )


class Route(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("experts", "choices", "groups", "keep_groups", "group_rule")),
        *((name, c_int64) for name in ("score", "weigh")),
        *((name, c_double) for name in ("epsilon", "scale")),
        ("gate", NativeMatrix),
        *((name, c_void_p) for name in ("bias", "chosen", "weights", "counts", "second", "margin")),
    )


class Feed(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("width", "experts", "choices", "shared_width", "activation")),
        ("weight_on_input", c_int64),
        *((name, NativeMatrix) for name in ("up", "down", "shared_up", "shared_down", "shared_gate")),
        ("post_norm", NativeNorm),
        *((name, c_void_p) for name in ("chosen", "weights", "keep")),
    )


class Layer(Structure):
    _fields_ = (
        ("attend", Attend),
        ("route", Route),
        ("feed", Feed),
        ("latent", c_int64),
        ("routed", c_int64),
    )


class Pass(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("threads", "tokens", "hidden", "many")),
        *((name, c_void_p) for name in ("x", "normed", "cos", "sin", "position")),
    )


class Sorted(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("kind", "experts", "outputs", "inputs")),
        *((name, c_int64) for name in ("rows_type", "other_type", "out_type")),
        *((name, c_void_p) for name in ("ends", "rows", "other", "out")),
    )


@final
@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of this machine. Every tensor that a call names stays alive until it returns."""

    library: Any
    tier: Tier
    lanes: int
    """Floats of a vector."""

    def layers(self, shared: Pass, layers: Array[Layer], first: int) -> int:
        """Run the layers from ``first`` on, and return the first whose router the kernels do not know.

        Of that one the first half is done. Where there is none the number of layers is returned.
        """
        at = ctypes.byref(layers, first * ctypes.sizeof(Layer))
        return first + self.library.consilium_layers(ctypes.byref(shared), at, c_int64(len(layers) - first))

    def feed(self, shared: Pass, call: Feed) -> None:
        """Run the second half of a layer."""
        self.library.consilium_feed(ctypes.byref(shared), ctypes.byref(call))

    def networks(self, call: Feed, x_RD: Tensor, experts_R: Tensor, *, many: bool = False) -> Tensor:
        """Float32 outputs [R, D] of float32 rows, each of the expert of its number; ``many`` as below."""
        y_RD = torch.empty_like(x_RD)
        shared = Pass(torch.get_num_threads(), *x_RD.shape, many, None, x_RD.data_ptr())
        call.choices, call.chosen = 1, experts_R.data_ptr()
        self.library.consilium_networks(ctypes.byref(shared), ctypes.byref(call), c_void_p(y_RD.data_ptr()))
        return y_RD

    def sorted(self, call: Sorted) -> None:
        """Compute a product of rows that are sorted by expert (source/train.h)."""
        if not self.library.consilium_sorted(ctypes.byref(call), c_int64(torch.get_num_threads())):
            raise MemoryError("no memory is left to multiply the rows of all experts; use smaller batches")

    def product(self, matrix: NativeMatrix, x_BI: Tensor, *, many: bool = False) -> Tensor:
        """Float32 products [B, O] of float32 rows with a matrix.

        Few rows: each has the same bits whatever rows are beside it. ``many``, as of a prompt, are faster.
        """
        y_BO = x_BI.new_empty(x_BI.shape[0], matrix.rows)
        sizes = (c_int64(value) for value in (x_BI.shape[0], many, torch.get_num_threads()))
        x, y = c_void_p(x_BI.data_ptr()), c_void_p(y_BO.data_ptr())
        self.library.consilium_product(ctypes.byref(matrix), x, *sizes, y)
        return y_BO


@functools.cache
def found() -> Kernels | Missing:
    """The kernels of this process, compiled where they were not, or why there are none.

    What cannot be loaded from the cache is compiled anew for this process: nothing may run from that folder,
    or a machine of another kind wrote it.
    """
    reason = ""
    for make in (built, built_alone):
        try:
            made = make()
            return made if isinstance(made, Missing) else _loaded(made)
        except OSError as error:
            reason = str(error)
    return Missing(reason, "set CONSILIUM_CACHE to a folder with room from which programs may run")


@functools.cache
def kernels() -> Kernels | None:
    here = found()
    return None if isinstance(here, Missing) else here


def _loaded(made: Built) -> Kernels:
    try:
        return opened(made.path, made.tier)
    finally:
        if not made.kept:
            made.path.unlink()


def opened(path: Path, tier: Tier) -> Kernels:
    """Load a compiled file, whose structures have to be those of this module."""
    library: Any = ctypes.CDLL(str(path))
    for name, structure in (("layer", Layer), ("pass", Pass), ("sorted", Sorted)):
        size = getattr(library, f"consilium_{name}_size")
        size.restype = c_int64
        assert size() == ctypes.sizeof(structure), f"{name} has another layout in {path}"
    library.consilium_lanes.restype = library.consilium_layers.restype = c_int64
    library.consilium_sorted.restype = c_int64
    for name in ("feed", "networks", "product"):
        getattr(library, f"consilium_{name}").restype = None
    return Kernels(library, tier, library.consilium_lanes())


def native(
    values: Tensor, shape: tuple[int, ...], *, scales: Tensor | None = None, bias_O: Tensor | None = None
) -> NativeMatrix | None:
    """A matrix of ``shape`` [..., O, I], or those of a stack one below the other, as kernels read them.

    None for a format, a device or a layout that they do not.
    """
    if not readable(values, scales) or not (bias_O is None or readable(bias_O)):
        return None
    kind = TYPES[values.dtype] if scales is None else SCALED[values.dtype][0]
    if scales is not None and values.dtype == torch.uint8 and scales.shape[-1] * 8 == values.shape[-1]:
        kind = _WITH_LOWEST
    places = (None if tensor is None else tensor.data_ptr() for tensor in (values, scales, bias_O))
    return NativeMatrix(*places, *shape[-2:], kind, 0 if bias_O is None else TYPES[bias_O.dtype])


def readable(values: Tensor, scales: Tensor | None = None) -> bool:
    """Whether kernels read these: known dtypes, on the CPU, one row after the other."""
    if scales is None:
        return values.dtype in TYPES and _is_here(values)
    known = values.dtype in SCALED and scales.dtype == SCALED[values.dtype][1]
    return known and _is_here(values) and _is_here(scales)


def native_norm(weight_D: Tensor | None, epsilon: float = 0.0) -> NativeNorm | None:
    """A norm, or what passes values on where there is no weight; None as in ``native``."""
    if weight_D is None:
        return NativeNorm(None, 0, 0.0)
    if not readable(weight_D):
        return None
    return NativeNorm(weight_D.data_ptr(), TYPES[weight_D.dtype], epsilon)


def _is_here(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()
