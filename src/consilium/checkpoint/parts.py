"""Training state in one file or in a file a process, read by rows: by whom it was written does not matter.

Each file holds rows of tensors; ``parts.json`` says with which row of a tensor its rows begin.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from consilium.checkpoint import safetensors_io
from consilium.checkpoint.json_file import read_object
from consilium.checkpoint.safetensors_io import Entry
from consilium.disk.manifest import damaged

SINGLE: Final = "state.safetensors"
INDEX: Final = "parts.json"
Rows = Callable[[str, int], range]
"""Which rows of a tensor, by its name and how many it has, somebody wants."""


def file_of(rank: int, processes: int) -> str:
    return f"state-{rank + 1:05}-of-{processes:05}.safetensors"


def index_text(firsts: Mapping[str, Mapping[str, int]]) -> bytes:
    """``firsts``: by file and tensor, the first row of those that are parts."""
    return (json.dumps(firsts, indent=1) + "\n").encode()


def every_row(name: str, rows: int) -> range:
    return range(rows)


def read_rows(folder: Path, rows: Rows = every_row) -> dict[str, Tensor]:
    """The rows of every tensor that ``rows`` asks for, on the CPU.

    Raises ConsiliumError where parts are missing or do not meet.
    """
    placed: dict[str, list[tuple[int, Entry]]] = {}
    for file, firsts in _files(folder).items():
        for name, entry in safetensors_io.read_header(folder / file).items():
            placed.setdefault(name, []).append((firsts.get(name, 0), entry))
    return {
        name: _read(name, sorted(parts, key=lambda part: part[0]), rows) for name, parts in placed.items()
    }


def _files(folder: Path) -> dict[str, dict[str, int]]:
    if not (folder / INDEX).exists():
        return {SINGLE: {}}
    index = read_object(folder / INDEX)
    if not all(Path(file).name == file and _is_firsts(firsts) for file, firsts in index.items()):
        raise damaged(folder / INDEX, "is not an index of parts")
    return index


def _is_firsts(firsts: Any) -> bool:
    return isinstance(firsts, dict) and all(type(first) is int and first >= 0 for first in firsts.values())


def _read(name: str, parts: list[tuple[int, Entry]], rows: Rows) -> Tensor:
    first = parts[0][1]
    if not first.shape:
        return _filled(name, [(range(0), first)], torch.zeros((), dtype=first.dtype), range(0))
    spans = [(range(begin, begin + entry.shape[0]), entry) for begin, entry in parts if entry.shape[0]]
    meet = [span.stop for span, _ in spans[:-1]] == [span.start for span, _ in spans[1:]]
    if spans and (spans[0][0].start or not meet):
        raise damaged(first.file, f"and the files beside it do not hold every row of {name[:80]} once")
    wanted = rows(name, spans[-1][0].stop if spans else 0)
    return _filled(name, spans, torch.zeros(len(wanted), *first.shape[1:], dtype=first.dtype), wanted)


def _filled(name: str, spans: list[tuple[range, Entry]], target: Tensor, wanted: range) -> Tensor:
    for span, entry in spans:
        if not entry.shape:
            safetensors_io.read_into(name, entry, target)
            continue
        begin, end = max(span.start, wanted.start), min(span.stop, wanted.stop)
        if begin < end:
            part = safetensors_io.rows_of(entry, begin - span.start, end - span.start)
            safetensors_io.read_into(name, part, target[begin - wanted.start : end - wanted.start])
    return target
