"""The weights of a GGUF file, checked against its own description, then read one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from consilium.checkpoint import weights
from consilium.checkpoint.gguf.keys import model_of
from consilium.checkpoint.gguf.tensors import is_by_expert, views
from consilium.config.generation import GenerationDefaults
from consilium.config.model import Model
from consilium.data.gguf import mark_ids, stop_ids
from consilium.errors import ConsiliumError
from consilium.model.build import DTYPES, build
from consilium.ops.gguf import Entry, Header, damaged, read_header
from consilium.ops.weights import GROUP, Packing, halves_of

_PIECE: Final = 2**22
"""Values that are dequantised at a time: what a read costs beside its target."""
_STORED: Final = {GGMLQuantizationType.F16: "float16", GGMLQuantizationType.BF16: "bfloat16"}
_PACKED: Final[Mapping[GGMLQuantizationType, Packing]] = {
    GGMLQuantizationType.Q8_0: "int8",
    GGMLQuantizationType.Q4_0: "int4",
    GGMLQuantizationType.Q4_1: "uint4",
    GGMLQuantizationType.Q4_K: "uint4",
}
"""Types that ``ops.weights`` has too, apart from where scales lie and, of the last, from their rounding."""
_INTEGERS: Final[Mapping[GGMLQuantizationType, int]] = {
    GGMLQuantizationType.Q8_0: 32,
    GGMLQuantizationType.Q4_0: 16,
    GGMLQuantizationType.Q4_1: 16,
}
"""Bytes that end a block of those which are one group."""
_ARCHS: Final[Mapping[str, MODEL_ARCH]] = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}


@final
@dataclass(frozen=True, slots=True)
class FileSource:
    """Weights that fit ``config``; ``state`` says our names, shapes and dtypes and has no memory."""

    config: Model
    generation: GenerationDefaults
    state: Mapping[str, Tensor]
    header: Header
    check_finite: bool

    def fill(self, name: str, target: Tensor) -> None:
        """Copy our tensor ``name`` into ``target``, dequantised; ConsiliumError names a tensor at fault."""
        for theirs, view in _views(self.config, self.header, name, target.detach()):
            _read_into(self.header.tensors[theirs], view, check_finite=self.check_finite)

    def fill_rows(self, name: str, target: Tensor, first: int) -> None:
        """Copy the rows of our tensor ``name`` from ``first`` on, as many as ``target`` has."""
        if target.shape == self.state[name].shape:
            self.fill(name, target)
        elif is_by_expert(name, self.header.tensors):
            for theirs, view in _views(self.config, self.header, name, target.detach(), first):
                _read_into(self.header.tensors[theirs], view, check_finite=self.check_finite)
        elif target.ndim == 3:  # a stack, whose experts lie one after the other
            for theirs, view in _views(self.config, self.header, name, target.detach()):
                _read_into(self.header.tensors[theirs], view, first, check_finite=self.check_finite)
        else:
            target.copy_(self.read(name)[first : first + target.shape[0]])

    def holds(self, name: str, packing: Packing) -> bool:
        """Whether the file has our tensor ``name`` packed so."""
        parts = _views(self.config, self.header, name, self.state[name])
        return all(_PACKED.get(self.header.tensors[theirs].kind) == packing for theirs, _ in parts)

    def fill_packed(self, name: str, codes: Tensor, scales: Tensor) -> None:
        """Copy the parts of our tensor ``name`` (``ops.weights.Packed``) as they lie in the file."""
        parts = (_views(self.config, self.header, name, part) for part in (codes, scales))
        for (theirs, code_view), (_, scale_view) in zip(*parts, strict=True):
            entry = self.header.tensors[theirs]
            _read_packed(entry, code_view, scale_view, check_finite=self.check_finite)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return our tensor ``name`` on the CPU, by default in the dtype that ``state`` says."""
        values = torch.zeros_like(self.state[name], dtype=dtype, device="cpu")
        self.fill(name, values)
        return values


def open_file(path: Path, *, dtype: str | None = None, check_finite: bool = False) -> FileSource:
    """Return the weights in the GGUF file ``path``, or of all parts of a split one.

    ``dtype`` is by default that of the embedding where it is one of ours, and float32 for quantised types:
    their values, times their scales, are not numbers of fewer bits. Raises ConsiliumError for a damaged file,
    an architecture or type that is not read, and names or shapes that do not fit.
    """
    header = read_header(path)
    config = model_of(header)
    if config.layers > len(header.tensors):
        raise damaged(path, f"asks for {config.layers} layers and holds {len(header.tensors)} tensors")
    for entry in header.tensors.values():
        _refuse_unreadable(entry)
    state = build(config, dtype=dtype or _stored_dtype(header), device="meta").state_dict()
    expected = {
        theirs: torch.empty(_flat(view), device="meta")
        for ours, tensor in state.items()
        for theirs, view in _views(config, header, ours, tensor)
    }
    weights.match(header.tensors, expected, path)
    return FileSource(config, _generation(path), state, header, check_finite)


def _generation(path: Path) -> GenerationDefaults:
    begin, padding = mark_ids(path)
    return GenerationDefaults(begin=begin, ends=stop_ids(path), padding=padding)


def _views(
    config: Model, header: Header, name: str, tensor: Tensor, first: int = 0
) -> Iterator[tuple[str, Tensor]]:
    arch = _ARCHS[header.keys["general.architecture"]]
    return views(config, arch, name, tensor, held=header.tensors, first=first)


def _flat(view: Tensor) -> tuple[int, ...]:
    """The shape that the file has for ``view``: pairs of rows are rows there."""
    return tuple(view.shape) if view.ndim <= 3 else (math.prod(view.shape[:-1]), view.shape[-1])


def _stored_dtype(header: Header) -> str:
    word = _STORED.get(header.tensors["token_embd.weight"].kind, "float32")
    return word if word in DTYPES else "float32"


def _refuse_unreadable(entry: Entry) -> None:
    _, size = GGML_QUANT_SIZES[entry.kind]
    try:
        dequantize(np.zeros((1, size), np.uint8), entry.kind)
    except (NotImplementedError, ValueError):
        raise ConsiliumError(
            f"{entry.file}: {entry.name[:80]} is of type {entry.kind.name}, which is not read here;"
            " use the file in another type, such as Q8_0 or F16."
        ) from None


def _read_into(entry: Entry, target: Tensor, first: int = 0, *, check_finite: bool) -> None:
    """Dequantise into ``target``, whose values are in the order of the file from its ``first`` on."""
    for part, stored in _pieces(entry, target, first):
        values = torch.from_numpy(dequantize(stored, entry.kind))
        if check_finite:
            _refuse_infinite(entry, values)
        target[part].copy_(values.view(target[part].shape))


def _read_packed(entry: Entry, integers: Tensor, scales: Tensor, *, check_finite: bool) -> None:
    """Rows of blocks as they lie, apart from where scales are."""
    for part, stored in _pieces(entry, integers):
        blocks = torch.from_numpy(stored).unflatten(1, (-1, GGML_QUANT_SIZES[entry.kind][1]))
        own = _INTEGERS.get(entry.kind)
        codes, found = _of_superblocks(blocks) if own is None else _of_blocks(blocks, own)
        if check_finite:
            _refuse_infinite(entry, found)
        scales[part].copy_(found.view(scales[part].shape))
        integers[part].copy_(codes.view(integers.dtype).view(integers[part].shape))


def _of_blocks(blocks: Tensor, integers: int) -> tuple[Tensor, Tensor]:
    """Integers, and what lies before them in float16: of a row first all scales, then all lowest values."""
    found = blocks[..., :-integers].contiguous().view(torch.float16)
    return blocks[..., -integers:].contiguous(), found.mT.flatten(1)


def _of_superblocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The same of 256 values: two in float16, by which 8 scales and 8 depths of 6 bits are multiplied.

    The first four of both are in bytes of their own; the last four have their lower bits in the next bytes,
    and the upper two in what the first leave free. Products are rounded to float16.
    """
    wide = blocks[..., :4].contiguous().view(torch.float16).float()
    first, second, rest = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scale = torch.cat((first & 63, rest & 15 | first >> 6 << 4), -1) * wide[..., :1]
    below = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), -1) * wide[..., 1:]
    pairs = blocks[..., 16:].unflatten(-1, (4, GROUP))
    integers = torch.stack((pairs & 15, pairs >> 4), -2)
    return halves_of(integers).contiguous(), torch.cat((scale.flatten(1), -below.flatten(1)), 1).half()


def _refuse_infinite(entry: Entry, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise damaged(entry.file, f"holds a value in {entry.name[:80]!r} that is not finite")


def _pieces(entry: Entry, target: Tensor, first: int = 0) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    """Parts of the first dimension of ``target``, which begins at the file's ``first``, and their bytes."""
    rows = math.prod(target.shape[1:-1])
    step = len(target) if target.ndim == 1 else max(1, _PIECE // (rows * entry.shape[-1]))
    try:
        with entry.file.open("rb") as file:
            file.seek(entry.offset + first * rows * entry.row_bytes)
            for start in range(0, len(target), step):
                count = 1 if target.ndim == 1 else rows * min(step, len(target) - start)
                stored = np.fromfile(file, np.uint8, count * entry.row_bytes)
                if stored.size < count * entry.row_bytes:
                    raise damaged(entry.file, f"ends inside tensor {entry.name[:80]!r}", "download it again")
                yield slice(start, start + step), stored.reshape(count, entry.row_bytes)
    except OSError as error:
        why = (error.strerror or "unknown error").lower()
        raise damaged(entry.file, f"cannot be read ({why}) at tensor {entry.name[:80]!r}") from None
