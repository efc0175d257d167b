"""Models whose matrices are packed as they are read, or lie packed in their files.

A folder of packed weights has our own names and, beside each weight ``X`` that is packed, its ``X_scales``.
``quantization_config`` of its config.json says so.

Legend: E experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from consilium.checkpoint.fp8 import KEY
from consilium.checkpoint.gguf.source import FileSource
from consilium.checkpoint.hf.config import NAME as CONFIG
from consilium.checkpoint.hf.config import OWN
from consilium.checkpoint.json_file import read_object
from consilium.checkpoint.source import PackedSource, Source
from consilium.errors import ConsiliumError
from consilium.machine.allocator import huge
from consilium.model.build import allocate
from consilium.model.decoder import Decoder
from consilium.model.packing import hold, packings, refuse_size
from consilium.ops.weights import BITS, PACKINGS, Packing, largest_of, pack_into, room

Progress = Callable[[int, int], None]
"""Hears of bytes of the files that are done, and of all."""

PART_BYTES: Final = 64 << 20
"""Of a stack that is read at once to be packed."""
_LOOKED_AT: Final = 2**22
"""Values that are checked at once."""


def description(packing: Packing) -> dict[str, Any]:
    """What config.json says of packed weights."""
    return {KEY: {"quant_method": OWN, "weights": packing}}


def packing_of(folder: Path) -> Packing | None:
    """What the weights in ``folder`` are packed into; None where they are not, or by somebody else."""
    match read_object(folder / CONFIG).get(KEY):
        case {"quant_method": method, "weights": str() as kind} if method == OWN:
            if kind not in PACKINGS:
                raise ConsiliumError(
                    f"{folder / CONFIG}: weights packed into {kind[:40]!r} are not known here, only"
                    f" {', '.join(PACKINGS)}; use a newer Consilium."
                )
            return kind
        case _:
            return None


def refuse_packed(folder: Path) -> None:
    """Raise ConsiliumError where weights are packed, for those who compute with their values."""
    if (kind := packing_of(folder)) is not None:
        raise ConsiliumError(
            f"{folder} holds weights packed into {kind}, which are for generating and measuring; give the"
            " model that they were packed from."
        )


def packed_state(model: Decoder, packing: Packing) -> Mapping[str, Tensor]:
    """Names, shapes and dtypes of a model on the meta device once it is packed."""
    for name, kind in packings(model, packing).items():
        hold(model, name, *room(model.get_parameter(name), kind))
    return model.state_dict()


def load_packed(
    source: PackedSource, packing: Packing, progress: Progress = lambda done, total: None
) -> Decoder:
    """Read a part of one matrix at a time: no more than that is ever there unpacked."""
    dtype = source.state["norm.weight"].dtype
    share = BITS[packing] / (8 * dtype.itemsize)
    model = allocate(source.config, source.generation, dtype=dtype, share=share)
    kinds = packings(model, packing)
    for name, values in model.state_dict().items():
        if name not in kinds and name in source.state:
            source.fill(name, values)
    done, total = 0, sum(model.get_parameter(name).nbytes for name in kinds)
    for name, kind in kinds.items():
        like = model.get_parameter(name)
        hold(model, name, *(_as_stored(source, name, like, kind) or _packed(source, name, like, kind)))
        progress(done := done + like.nbytes, total)
    return model


def _as_stored(
    source: PackedSource, name: str, like: Tensor, packing: Packing
) -> tuple[Tensor, Tensor] | None:
    """Codes and scales that the files hold already; None where a GGUF file has some that kernels do not."""
    if not source.holds(name, packing):
        return None
    codes, scales = (huge(part) for part in room(like, packing))
    source.fill_packed(name, codes, scales)
    if (fault := _unread(codes)) is None:
        return codes, scales
    if isinstance(source, FileSource):
        return None
    raise ConsiliumError(f"{name} holds {fault}, which packed weights do not; pack or download them again.")


def _unread(codes: Tensor) -> str | None:
    """What kernels do not read as it is: -128 overflows in products of AVX2; of floats, what is no number."""
    rows = max(1, _LOOKED_AT // max(codes.shape[-1], 1))
    parts = codes.flatten(0, -2).split(rows)
    if codes.dtype == torch.int8 and any(part.amin() < -127 for part in parts):
        return "-128"
    if codes.is_floating_point() and any(part.bfloat16().isnan().any() for part in parts):
        return "NaN"
    return None


def _packed(source: Source, name: str, like: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    codes, scales = (huge(part) for part in room(like, packing))
    largest = 0.0
    for first, part in _parts(source, name, like):
        rows = slice(first, first + len(part))
        pack_into(part, packing, codes[rows], scales[rows])
        largest = max(largest, largest_of(part))
    refuse_size(name, largest, packing)
    return codes, scales


def _parts(source: Source, name: str, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Values of a weight and the row that they begin with, a stack by some experts at a time."""
    rows = len(like) if like.ndim < 3 else max(1, PART_BYTES // (like[0].numel() * like.itemsize))
    for first in range(0, len(like), rows):
        part = torch.empty(min(rows, len(like) - first), *like.shape[1:], dtype=like.dtype)
        source.fill_rows(name, part, first)
        yield first, part
