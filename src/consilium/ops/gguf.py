"""The header of a GGUF file: what it says of itself and where its tensors lie; nothing of them is read.

Every count and offset is compared with the bytes that are there before it is used, so a hostile file costs
no more time or memory than its own size. The layout is that of version 3 (and 2, which is the same) of the
format: magic, version, counts, key-value pairs, descriptions of tensors, padding, tensors.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, final

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from consilium.errors import ConsiliumError

_T = TypeVar("_T")
_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MOST_DIMENSIONS: Final = 4
_MOST_TENSORS: Final = 2**20
_MOST_KEYS: Final = 2**16
_LONGEST_NAME: Final = 2**16
_SCALARS: Final[Mapping[int, str]] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_Described = tuple[tuple[int, ...], int, int]
"""Shape, kind and offset behind the header."""
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SPLIT: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file. ``shape`` is that of its values, rows before columns."""

    file: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of the last dimension."""
        values, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // values * size


@dataclass(frozen=True, slots=True)
class Header:
    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, Entry]


def read_header(path: Path) -> Header:
    """Return the header of ``path``, or of all its parts where it is one of several.

    Raises ConsiliumError naming file and place where it is damaged, truncated, or of another format.
    """
    first = _read_one(path)
    parts = first.keys.get("split.count", 1)
    if not isinstance(parts, int) or parts <= 1:
        return first
    return _joined(path, [_read_one(part) for part in _siblings(path, parts)])


def _siblings(path: Path, count: int) -> list[Path]:
    match = _SPLIT.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise ConsiliumError(
            f"{path} is one of {count} parts, and its name does not end in -00001-of-{count:05d}.gguf;"
            " give the parts the names that they were published with."
        )
    found = [path.with_name(f"{match[1]}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    for part in found:
        if not part.is_file():
            raise ConsiliumError(
                f"{path} is one of {count} parts, and {part.name} is missing; download it too."
            )
    return found


def _joined(path: Path, headers: list[Header]) -> Header:
    tensors: dict[str, Entry] = {}
    for number, header in enumerate(headers):
        if header.keys.get("split.no") != number or header.keys.get("split.count") != len(headers):
            raise damaged(header.path, f"is not part {number + 1} of {len(headers)}")
        for name, entry in header.tensors.items():
            if name in tensors:
                raise damaged(header.path, f"holds {name!r}, which another part holds too")
            tensors[name] = entry
    if len(tensors) != headers[0].keys.get("split.tensors.count", len(tensors)):
        raise damaged(path, f"announces other tensors than the {len(tensors)} of its parts")
    return Header(path, headers[0].keys, tensors)


def _read_one(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24 or file.read(4) != _MAGIC:
                raise damaged(path, "is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, _Cursor(path, data, 4))
    except OSError as error:
        raise ConsiliumError(
            f"cannot read {path}: {(error.strerror or str(error)).lower()}; give a GGUF file that is there."
        ) from None


@final
class _Cursor:
    """Reads forward and never past the end."""

    def __init__(self, path: Path, data: mmap.mmap, place: int) -> None:
        self.path = path
        self.place = place
        self._data = data

    @property
    def left(self) -> int:
        return len(self._data) - self.place

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise damaged(self.path, f"ends inside its header, at byte {len(self._data):,}")
        self.place += count
        return self._data[self.place - count : self.place]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, longest: int | None = None) -> str:
        length = self.number("<Q")
        if longest is not None and length > longest:
            raise damaged(self.path, f"has a name of {length:,} bytes")
        return self.take(length).decode("utf-8", errors="replace")


def _parse(path: Path, cursor: _Cursor) -> Header:
    version = cursor.number("<I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        why = "is big-endian" if swapped else f"is of version {version} of the format"
        raise damaged(path, f"{why}, and versions 2 and 3 in little-endian are read", "convert it anew")
    tensors, pairs = cursor.number("<Q"), cursor.number("<Q")
    if tensors > _MOST_TENSORS or pairs > _MOST_KEYS:
        raise damaged(path, f"announces {tensors:,} tensors and {pairs:,} keys")
    keys = _unique(path, cursor, pairs, _pair)
    described = _unique(path, cursor, tensors, _described)
    alignment = keys.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise damaged(path, f"has an alignment of {alignment!r}, which is no power of two")
    start = -(-cursor.place // alignment) * alignment
    end = cursor.place + cursor.left
    return Header(path, keys, {n: _placed(path, n, d, start, end) for n, d in described.items()})


def _unique(
    path: Path, cursor: _Cursor, count: int, read: Callable[[_Cursor], tuple[str, _T]]
) -> dict[str, _T]:
    found: dict[str, _T] = {}
    for _ in range(count):
        name, value = read(cursor)
        if name in found:
            raise damaged(path, f"names {name[:80]!r} twice")
        found[name] = value
    return found


def _pair(cursor: _Cursor) -> tuple[str, Any]:
    return cursor.text(_LONGEST_NAME), _value(cursor, cursor.number("<I"))


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind == _STRING:
        return cursor.text()
    if kind != _ARRAY:
        return _numbers(cursor, kind, 1)[0]
    kind, count = cursor.number("<I"), cursor.number("<Q")
    if kind == _ARRAY:
        raise damaged(cursor.path, "has a list of lists")
    if kind != _STRING:
        return _numbers(cursor, kind, count)
    if count > cursor.left // 8:  # bytes of the shortest string: its length alone
        raise damaged(cursor.path, f"ends inside a list of {count:,} texts")
    return [cursor.text() for _ in range(count)]


def _numbers(cursor: _Cursor, kind: int, count: int) -> list[Any]:
    if kind not in _SCALARS:
        raise damaged(cursor.path, f"has a value of kind {kind}, which the format does not know")
    form = np.dtype(_SCALARS[kind])
    values = np.frombuffer(cursor.take(count * form.itemsize), form)
    if kind == _BOOL:
        return values.astype(bool).tolist()
    # A float32 is what its shortest decimal says: 1e-5, not 9.999999747378752e-06.
    return [float(str(value)) for value in values] if form == np.float32 else values.tolist()


def _described(cursor: _Cursor) -> tuple[str, _Described]:
    name, dimensions = cursor.text(_LONGEST_NAME), cursor.number("<I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise damaged(cursor.path, f"gives {name[:80]!r} {dimensions} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
    return name, (shape, cursor.number("<I"), cursor.number("<Q"))


def _placed(path: Path, name: str, described: _Described, start: int, end: int) -> Entry:
    shape, number, offset = described
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise damaged(path, f"has {name[:80]!r} in type {number}, which the format does not know") from None
    values, size = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % values:
        raise damaged(
            path, f"has {name[:80]!r} of {list(shape)} values, which blocks of {values} do not fill"
        )
    length = 1
    for side in shape:  # Python's numbers do not overflow
        length *= side
    if start + offset + length // values * size > end:
        raise damaged(path, f"ends inside tensor {name[:80]!r}", "download it again")
    return Entry(path, name, kind, shape, start + offset)


def damaged(path: Path, what: str, remedy: str = "download or convert it again") -> ConsiliumError:
    return ConsiliumError(f"{path} {what}; {remedy}.")
