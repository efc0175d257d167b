"""Weights in 8 bits with one factor a block, as DeepSeek-V3 publishes them (2412.19437 section 3.3).

``NAME_scale_inv`` holds what each block of ``NAME`` is multiplied with, whatever its name says. The last
block of a row or column is as long as the matrix leaves it.

Legend: M matrices, R rows, C columns of a matrix; a block is ``high`` rows by ``wide`` columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from consilium.checkpoint import safetensors_io
from consilium.checkpoint.hf.config import OWN
from consilium.checkpoint.safetensors_io import Entry
from consilium.errors import ConsiliumError

KEY: Final = "quantization_config"
SUFFIX: Final = "_scale_inv"
_OWN: Final = "_scales"
"""What we call scales: a row of groups is packed otherwise than a block (``ops.weights.Packed``)."""
_FACTORS: Final = (torch.float32, torch.bfloat16, torch.float16)
"""DeepSeek publishes factors in the first, Qwen in the second."""
_READ: Final[Mapping[str, tuple[object, ...]]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),
}


_FILES: Final[Mapping[str, str]] = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
"""Descriptions that lie beside config.json."""
_ENDINGS: Final[Mapping[str, str]] = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    "_proj_blocks": "MXFP4",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".W_q": "HQQ",
    ".weight._data": "quanto",
    ".biases": "MLX",
}
"""How the packed parts of a matrix are called."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """A tensor in 8 bits [..., R, C] and its factors [..., ceil(R / high), ceil(C / wide)]."""

    values: Entry
    scales: Entry
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


Stored = Entry | Scaled


def block_size(keys: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Return rows and columns of a block by ``quantization_config``; ConsiliumError for others' kinds."""
    found = keys.get(KEY)
    if found is None:
        return 128, 128
    if not isinstance(found, dict):
        raise _unread(path, "", found)
    if (method := _method(found)) == OWN:
        return 128, 128
    if method not in {"fp8", "None"}:
        raise _unread(path, ".quant_method", method)
    for key, known in _READ.items():
        if found.get(key) not in known:
            raise _unread(path, f".{key}", found.get(key))
    match found.get("weight_block_size", [128, 128]):
        case [int() as high, int() as wide] if high > 0 and wide > 0:
            return high, wide
        case other:
            raise _unread(path, ".weight_block_size", other)


def refuse_packed(keys: Mapping[str, Any], names: Iterable[str], folder: Path) -> None:
    """Raise ConsiliumError that names the method of weights which are packed in a way that is not read here.

    It stands in config.json, in a file of its own beside it, or shows in what tensors are called.
    """
    for key in ("compression_config", "quantization"):
        if isinstance(found := keys.get(key), dict):
            raise _packed(folder, _method(found))
    for file, method in _FILES.items():
        if (folder / file).exists():
            raise _packed(folder, method)
    for name in names:
        for ending, method in _ENDINGS.items():
            if name.endswith(ending):
                raise _packed(folder, f"{method} ({name[:120]})")


def _method(found: Mapping[str, Any]) -> str:
    """What a description of a quantisation calls itself; MLX and old bitsandbytes leave that out."""
    named = found.get("quant_method") or found.get("quant_algo") or found.get("format")
    if named is None and any("load_in_" in str(key) for key in found):
        return "bitsandbytes"
    if named is None and {"group_size", "bits"} <= found.keys():
        return "MLX"
    return str(named)[:60]


def _packed(where: Path, method: str) -> ConsiliumError:
    return ConsiliumError(
        f"{where}: weights packed by {method} are not read here, only plain ones and float8 (e4m3) in blocks;"
        " use the weights in bfloat16."
    )


def pair(found: Mapping[str, Entry], block: tuple[int, int]) -> dict[str, Stored]:
    """Put each tensor in 8 bits together with its factors, which are no tensors of their own afterwards.

    Raises ConsiliumError naming the tensor where one of the two is missing or of another shape.
    """
    eights = (name for name, entry in found.items() if entry.dtype == torch.float8_e4m3fn)
    eight = {name for name in eights if name + _OWN not in found}
    stored: dict[str, Stored] = {}
    for name, entry in found.items():
        owner = name.removesuffix(SUFFIX)
        if name in eight:
            stored[name] = _scaled(name, entry, found.get(name + SUFFIX), block)
        elif owner == name:
            stored[name] = entry
        elif owner not in eight:
            raise ConsiliumError(
                f"{entry.file}: {name[:120]} scales a tensor in 8 bits and {owner[:120]} is"
                f" {'not there' if owner not in found else 'not one'}; download the weights again."
            )
    return stored


def read_into(name: str, stored: Scaled, target: Tensor, *, check_finite: bool = False) -> None:
    """Dequantise into ``target`` of the same shape: each value times the factor of its block, in float32.

    Works through a row of blocks at a time. ``check_finite`` raises ConsiliumError naming the tensor when a
    value or a factor is NaN or infinite.
    """
    assert target.shape == stored.shape, name
    high, wide = stored.block
    scales = torch.zeros(stored.scales.shape)
    safetensors_io.read_into(name + SUFFIX, stored.scales, scales, check_finite=check_finite)
    *_, rows, columns = stored.shape
    heights = list(_heights(target.numel() // max(rows * columns, 1), rows, high))
    bands = safetensors_io.pieces(name, stored.values, (height * columns for height in heights))
    out_RC, done = target.detach().view(-1, columns), 0
    for height, piece, scale in zip(heights, bands, scales.view(-1, scales.shape[-1]), strict=True):
        band_RC = piece.float().view(height, columns)
        if check_finite:
            safetensors_io.refuse_infinite(name, stored.values, band_RC)
        out_RC[done : done + height] = band_RC * scale.repeat_interleave(wide)[:columns]
        done += height


def read_packed(
    name: str, stored: Scaled, codes: Tensor, scales: Tensor, *, check_finite: bool = False
) -> None:
    """Copy the values as they lie into ``codes`` [..., R, C], and the factors of each row into ``scales``."""
    factors = torch.empty(stored.scales.shape)
    safetensors_io.read_into(name, stored.values, codes)
    safetensors_io.read_into(name + SUFFIX, stored.scales, factors, check_finite=check_finite)
    scales.copy_(factors.repeat_interleave(stored.block[0], -2)[..., : codes.shape[-2], :])


def _heights(matrices: int, rows: int, high: int) -> Iterator[int]:
    """Rows of each row of blocks, matrix after matrix."""
    for _ in range(matrices):
        for start in range(0, rows, high):
            yield min(high, rows - start)


def _scaled(name: str, entry: Entry, scales: Entry | None, block: tuple[int, int]) -> Scaled:
    if scales is None:
        raise ConsiliumError(
            f"{entry.file}: tensor {name[:120]} is in 8 bits without its factors {name[:120]}{SUFFIX};"
            " download the weights again, or those in bfloat16."
        )
    sides = zip(entry.shape[-2:], block, strict=False)
    wanted = (*entry.shape[:-2], *(-(-size // side) for size, side in sides))
    if scales.dtype not in _FACTORS or scales.shape != wanted or len(wanted) < 2:
        raise ConsiliumError(
            f"{scales.file}: {name[:120]}{SUFFIX} is {scales.dtype} {list(scales.shape)[:8]}, and a tensor of"
            f" {list(entry.shape)[:8]} in blocks of {block[0]} x {block[1]} needs float32 {list(wanted)[:8]};"
            " download the weights again."
        )
    return Scaled(entry, scales, block)


def _unread(path: Path, key: str, value: object) -> ConsiliumError:
    return ConsiliumError(
        f"{path}: {KEY}{key} {str(value)[:60]!r} is not read here, only float8 (e4m3) in blocks;"
        " use the weights in bfloat16."
    )
