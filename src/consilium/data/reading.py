"""Files of text, read as a stream: plain text, records a line, compressed or not, and Parquet.

Memory is bounded whatever a file holds: long texts are cut, lines and what a file unpacks to have limits.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Final, NamedTuple, cast, final

from consilium.data.documents import Text, bounded, part_name, parts
from consilium.data.forms import read_domain, read_record
from consilium.errors import ConsiliumError

PLAIN: Final = (".txt", ".md", ".py")
SUFFIXES: Final = (*PLAIN, ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
LONGEST_LINE: Final = 2**24
"""Bytes of a record."""
_BLOCK: Final = 2**20
_DENSEST, _FREE = 1000, 2**26
"""Times that a file may unpack to its own size, beyond some bytes; text seldom reaches ten."""
_WINDOW: Final = 2**27
"""Bytes that zstd may look back: what ``zstd --long`` needs."""
_ROWS: Final = 64
_GROUP: Final = 2**30
"""Unpacked bytes of a column of a row group."""


def suffix_of(path: Path) -> str | None:
    """The suffix by which ``path`` is read, None where it is not."""
    name = path.name.lower()
    return next((suffix for suffix in reversed(SUFFIXES) if name.endswith(suffix)), None)


def read_texts(path: Path, name: str, domain: str) -> Iterator[Text]:
    """Yield the texts of a file that is called ``name``; a record is a text, and may say its own domain.

    Raises ConsiliumError for what is unreadable, binary or malformed.
    """
    suffix = suffix_of(path)
    try:
        if suffix in PLAIN:
            yield from _plain(path, name, domain)
        else:
            for place, record in _rows(path) if suffix == ".parquet" else _lines(path, suffix or ""):
                where = f"data: {shown(path)}, {place}"
                title = f"{name}:{place.rpartition(' ')[2]}"
                content, chosen = read_record(record, where), read_domain(record, domain, where)
                yield from bounded(Text(content, chosen, title, title))
    except OSError as error:
        raise ConsiliumError(
            f"data: cannot read {shown(path)}: {error.strerror or error}; check its permissions."
        ) from None


def shown(path: Path) -> str:
    """A name in any bytes as text."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def _plain(path: Path, name: str, domain: str) -> Iterator[Text]:
    """A text that is cut keeps the name of the file as its unit."""
    with path.open("rb") as file:
        found = parts(_decoded(file, path))
        first = next(found, None)
        second = None if first is None else next(found, None)
        if first is not None and second is None:
            yield Text(first, domain, name, name)
        elif first is not None and second is not None:
            yield Text(first, domain, part_name(name, 1), name)
            yield Text(second, domain, part_name(name, 2), name)
            for number, part in enumerate(found, start=3):
                yield Text(part, domain, part_name(name, number), name)


def _decoded(file: BinaryIO, path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 3 if file.read(3) == codecs.BOM_UTF8 else 0
    file.seek(done)
    carry = ""
    while True:
        data = file.read(_BLOCK)
        waiting = len(decoder.getstate()[0])
        try:
            text = carry + decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise ConsiliumError(
                f"data: {shown(path)} is not UTF-8 text (byte {done - waiting + error.start}); convert it or"
                " leave it out."
            ) from None
        done += len(data)
        if "\0" in text:
            raise ConsiliumError(
                f"data: {shown(path)} has NUL bytes, so it is binary and not text; leave it out."
            )
        # A line end of two characters may lie across two blocks.
        carry = text[-1:] if data and text.endswith("\r") else ""
        yield text[: len(text) - len(carry)].replace("\r\n", "\n")
        if not data:
            return


def _lines(path: Path, suffix: str) -> Iterator[tuple[str, dict[str, object]]]:
    with path.open("rb") as file:
        unpacked = _unpack(file, path, suffix)
        budget, number = _Budget(path), 0
        while line := _line(unpacked, path, number + 1):
            number += 1
            budget.take(len(line))
            if line.strip():
                yield f"line {number}", _record(line, number, path)


def _line(unpacked: _Unpacked, path: Path, number: int) -> bytes:
    try:
        line = unpacked.stream.readline(LONGEST_LINE + 1)
    except unpacked.errors as error:
        raise _damaged(path, error) from None
    if len(line) > LONGEST_LINE:
        raise ConsiliumError(
            f"data: {shown(path)}, line {number} is longer than {LONGEST_LINE // 2**20} MiB; write one record"
            " a line, and long texts to files of their own."
        )
    return line


def _damaged(path: Path, error: BaseException) -> ConsiliumError:
    return ConsiliumError(f"data: {shown(path)} is damaged ({error}); copy it again from its source.")


def _record(line: bytes, number: int, path: Path) -> dict[str, object]:
    where = f"data: {shown(path)}, line {number}"
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise ConsiliumError(f"{where} is not UTF-8 text (byte {error.start}); convert the file.") from None
    except (ValueError, RecursionError) as error:
        raise ConsiliumError(f"{where} is not JSON ({error}); write one object a line.") from None
    if not isinstance(record, dict):
        raise ConsiliumError(f'{where} is {type(record).__name__}, not an object; write {{"text": ...}}.')
    return record


class _Unpacked(NamedTuple):
    stream: BinaryIO
    errors: tuple[type[Exception], ...]
    """What its library raises of damaged files."""


def _unpack(file: BinaryIO, path: Path, suffix: str) -> _Unpacked:
    if suffix.endswith(".gz"):
        stream = cast("BinaryIO", gzip.GzipFile(fileobj=file, mode="rb"))
        return _Unpacked(stream, (EOFError, zlib.error, gzip.BadGzipFile))
    if suffix.endswith(".zst"):
        zstandard = extra("zstandard", path)
        _refuse_cut_off(file, path)
        unpacker = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        reader = unpacker.stream_reader(file, read_across_frames=True)
        return _Unpacked(io.BufferedReader(reader, _BLOCK), (zstandard.ZstdError,))
    return _Unpacked(file, ())


def _refuse_cut_off(file: BinaryIO, path: Path) -> None:
    """The zstd library takes the end of a file for the end of a frame. RFC 8878, section 3.1."""
    size = path.stat().st_size
    end = 0
    while end < size:
        end = _frame_end(file, end)
    if end > size:
        raise _damaged(path, EOFError("it ends inside a frame"))
    file.seek(0)


def _frame_end(file: BinaryIO, start: int) -> int:
    """Where the frame at ``start`` ends by its headers; what is no frame is left to the library to refuse."""
    file.seek(start)
    head = file.read(5).ljust(5, b"\0")
    magic = int.from_bytes(head[:4], "little")
    if magic >> 4 == 0x184D2A5:  # to be skipped
        file.seek(start + 4)
        return start + 8 + int.from_bytes(file.read(4), "little")
    if magic != 0xFD2FB528:
        return max(file.seek(0, os.SEEK_END), start + 5)
    described = head[4]
    alone = described >> 5 & 1
    content_size = (alone, 2, 4, 8)[described >> 6]
    return _blocks_end(file, start + 5 + (1 - alone) + (0, 1, 2, 4)[described & 3] + content_size) + (
        4 if described >> 2 & 1 else 0
    )


def _blocks_end(file: BinaryIO, start: int) -> int:
    last = False
    while not last:
        file.seek(start)
        block = file.read(3)
        described = int.from_bytes(block, "little") if len(block) == 3 else 1
        last, kind, size = bool(described & 1), described >> 1 & 3, described >> 3
        start += 3 + (1 if kind == 1 else size)
    return start


def extra(name: str, path: Path) -> ModuleType:
    """Import a library that only some files need. Raises ConsiliumError that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConsiliumError(
            f"data: {shown(path)} needs {name}, which is not installed: pip install 'consilium-moe[data]'."
        ) from None


@final
class _Budget:
    """Ends the reading of a small file that unpacks to a huge one."""

    def __init__(self, path: Path) -> None:
        self._path, self._left = path, _DENSEST * path.stat().st_size + _FREE

    def take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise ConsiliumError(
                f"data: {shown(self._path)} unpacks to more than {_DENSEST:,} times its size, which no text"
                " does; leave it out."
            )


def _rows(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    arrow = extra("pyarrow.parquet", path)
    budget, number = _Budget(path), 0
    try:
        with arrow.ParquetFile(path, pre_buffer=False) as file:
            columns = _columns(file, path)
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns, use_threads=False):
                budget.take(batch.nbytes)
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    except ConsiliumError:
        raise
    except Exception as error:  # the library has many kinds for what is damaged
        if not type(error).__module__.startswith("pyarrow"):
            raise
        raise _damaged(path, error) from None


def _columns(file: Any, path: Path) -> list[str]:
    known = ("text", "messages", "prompt", "completion", "domain")
    columns = [name for name in file.schema_arrow.names if name in known]
    for group in range(file.metadata.num_row_groups):
        found = file.metadata.row_group(group)
        for place in range(found.num_columns):
            if found.column(place).total_uncompressed_size > _GROUP:
                raise ConsiliumError(
                    f"data: row group {group + 1} of {shown(path)} has more than {_GROUP // 2**20} MiB in a"
                    " column; write it in smaller row groups."
                )
    return columns or list(file.schema_arrow.names)
