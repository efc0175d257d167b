"""Reading and writing safetensors with checks of our own: its usual parser accepts too much.

Layout of a file: 8 bytes little-endian length, that many bytes of JSON header, then the tensors back to back.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from consilium.disk.files import DISK, Chunk, Filesystem
from consilium.errors import ConsiliumError

SINGLE: Final = "model.safetensors"
DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_READABLE: Final[Mapping[str, torch.dtype]] = {**DTYPES, "F8_E4M3": torch.float8_e4m3fn}
_CODES: Final = {dtype: code for code, dtype in _READABLE.items()}
_LARGEST_HEADER: Final = 100 * 2**20
_HEADER_BASE: Final = 2**20
_HEADER_PER_TENSOR: Final = 512
_PIECE: Final = 2**20
"""Bytes read at a time, so that loading needs this much beside the model."""

Values = Callable[[str], Tensor]
"""Gives a tensor by its name when it is written, so that never all of them are in memory."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: bytes ``start`` to ``end`` of ``file``."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def write(
    path: Path, tensors: Mapping[str, Tensor], *, values: Values | None = None, files: Filesystem = DISK
) -> None:
    """Write ``tensors`` to ``path``, widest dtype first so that each lies at a multiple of its own size.

    With ``values``, ``tensors`` say shapes and dtypes only and may lie on the meta device; each is asked for
    once, in their order within a width.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    held = map(values or tensors.__getitem__, order)
    files.write(path, _chunks(struct.pack("<Q", len(text)) + text, held))


def write_sharded(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    values: Values | None = None,
    shard_bytes: int = 5 * 10**9,
    files: Filesystem = DISK,
) -> None:
    """Write ``model.safetensors``, or numbered shards of at most ``shard_bytes`` and their index.

    ``values`` as in ``write``.
    """
    shards = _assign(tensors, shard_bytes)
    if len(shards) == 1:
        write(folder / SINGLE, tensors, values=values, files=files)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write(folder / file, {name: tensors[name] for name in names}, values=values, files=files)
        weight_map |= dict.fromkeys(names, file)
    total = sum(_bytes(tensor) for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    files.write(folder / f"{SINGLE}.index.json", [json.dumps(index, indent=2).encode()])


def read_header(path: Path, *, tensors: int | None = None) -> dict[str, Entry]:
    """Return where each tensor of ``path`` lies, or raise ConsiliumError naming file, tensor and fault.

    ``tensors`` is how many the reader expects: a header far larger than they need is never parsed.
    """
    limit = (
        _LARGEST_HEADER
        if tensors is None
        else min(_LARGEST_HEADER, _HEADER_BASE + tensors * _HEADER_PER_TENSOR)
    )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise _bad(path, f"is truncated: {size} bytes cannot hold its header")
            if length > limit:
                raise _bad(
                    path, f"has a header of {length} bytes, more than the {limit} that its tensors can need"
                )
            text = file.read(length)
    except OSError as error:
        raise _bad(path, f"cannot be read ({(error.strerror or 'unknown error').lower()})") from None
    return _entries(path, _parse(path, text), data=8 + length, size=size)


def read_into(name: str, entry: Entry, target: Tensor, *, check_finite: bool = False) -> None:
    """Copy a tensor's bytes into ``target`` of the same shape, piece by piece, converting floating dtypes.

    ``check_finite`` raises ConsiliumError naming the tensor when it holds NaN or infinity.
    """
    assert target.shape == entry.shape, name
    if entry.dtype != target.dtype and not (entry.dtype.is_floating_point and target.dtype.is_floating_point):
        raise _bad(entry.file, f"has {name} as {_CODES[entry.dtype]} where {_CODES[target.dtype]} is needed")
    flat = target.detach().view(-1)
    done = 0
    for piece in pieces(name, entry, itertools.repeat(_PIECE)):
        if check_finite:
            refuse_infinite(name, entry, piece)
        flat[done : done + piece.numel()].copy_(piece)
        done += piece.numel()


def read(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file that we wrote, on the CPU."""
    found: dict[str, Tensor] = {}
    for name, entry in read_header(path).items():
        found[name] = torch.zeros(entry.shape, dtype=entry.dtype)
        read_into(name, entry, found[name])
    return found


def pieces(name: str, entry: Entry, lengths: Iterable[int]) -> Iterator[Tensor]:
    """Yield the values of a tensor one after the other, ``lengths`` in bytes, the last as long as is left."""
    left = entry.end - entry.start
    try:
        with entry.file.open("rb") as file:
            file.seek(entry.start)
            for length in lengths:
                if not left:
                    return
                buffer = bytearray(min(length, left))
                if file.readinto(buffer) != len(buffer):
                    raise _bad(entry.file, f"ends inside tensor {name}")
                left -= len(buffer)
                yield torch.frombuffer(buffer, dtype=entry.dtype)
    except OSError as error:
        raise _bad(entry.file, f"cannot be read ({error.strerror}) at tensor {name}") from None


def refuse_infinite(name: str, entry: Entry, values: Tensor) -> None:
    """Raise ConsiliumError naming the tensor when ``values`` of it hold NaN or infinity."""
    if values.is_floating_point() and not torch.isfinite(values).all():
        raise ConsiliumError(
            f"{entry.file}: tensor {name} holds NaN or infinity, so the model would answer nonsense;"
            " use an earlier checkpoint."
        )


def refuse_overflow(name: str, values: Tensor) -> None:
    """Raise ConsiliumError naming the tensor when ``values``, finite once, no longer are in their dtype."""
    # float32 and bfloat16 have one range; a scan of the ends makes no copy, as isfinite does.
    if values.dtype == torch.float16 and not all(math.isfinite(float(end)) for end in values.aminmax()):
        raise ConsiliumError(f"{name} goes beyond 65504, where float16 ends; give --dtype bfloat16.")


def _chunks(header: bytes, tensors: Iterable[Tensor]) -> Iterator[Chunk]:
    yield header
    for tensor in tensors:
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _assign(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = most
    for name, tensor in tensors.items():
        if shards[-1] and _bytes(tensor) > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= _bytes(tensor)
    return shards


def _parse(path: Path, text: bytes) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        data: dict[str, object] = {}
        for name, value in pairs:
            if name in data:
                raise _bad(path, f"has {name[:80]!r} twice in its header")
            data[name] = value
        return data

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except ConsiliumError:
        raise
    except (ValueError, RecursionError):
        raise _bad(path, "has a header that is not JSON") from None
    if not isinstance(header, dict):
        raise _bad(path, "has a header that is not an object")
    header.pop("__metadata__", None)
    return header


def _entries(path: Path, header: dict[str, object], *, data: int, size: int) -> dict[str, Entry]:
    """Check each entry and that together they fill the file without holes, overlaps or a missing end."""
    entries = {name: _entry(path, name, described, data) for name, described in header.items()}
    end = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise _bad(path, f"has a hole or an overlap before tensor {name[:80]}")
        end = entry.end
    if end != size:
        kind = "truncated" if size < end else "longer than its header says"
        raise _bad(path, f"is {kind}: {size} bytes instead of {end}")
    return entries


def _entry(path: Path, name: str, described: object, data: int) -> Entry:
    match described:
        case {
            "dtype": str() as code,
            "shape": [*shape],
            "data_offsets": [int() as start, int() as end],
            **rest,
        }:
            if rest or not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, start, end)):
                raise _bad(path, f"describes tensor {name[:80]!r} with values that make no sense")
        case _:
            raise _bad(path, f"describes tensor {name[:80]!r} without dtype, shape and data_offsets")
    if code not in _READABLE:
        raise ConsiliumError(
            f"{path}: tensor {name[:80]} has dtype {code[:20]}, which is not read here;"
            " convert the weights to bfloat16."
        )
    if math.prod(shape) * _READABLE[code].itemsize != end - start:
        raise _bad(path, f"gives tensor {name[:80]} a shape that does not fill its {end - start} bytes")
    return Entry(path, _READABLE[code], tuple(shape), data + start, data + end)


def _bad(path: Path, what: str) -> ConsiliumError:
    return ConsiliumError(f"{path} {what}; restore it, or download or save it again.")


def rows_of(entry: Entry, begin: int, end: int) -> Entry:
    """Some rows of a tensor, which lie one after the other."""
    row = (entry.end - entry.start) // entry.shape[0]
    return dataclasses.replace(
        entry,
        shape=(end - begin, *entry.shape[1:]),
        start=entry.start + begin * row,
        end=entry.start + end * row,
    )
