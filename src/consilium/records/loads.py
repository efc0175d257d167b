"""Expert loads of a run: ``routing/loads.json`` says the shape, ``routing/loads.bin`` holds the counts.

One record a step, little-endian, no padding: int64 step, then int32 [layers, experts], row-major. Records
have one size and rising steps: a file torn by a crash, or filled with NULs by a power cut, is read up to its
last whole record, and a resume cuts it at a step.

Legend: S recorded steps, L MoE layers, E experts.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated, Literal, final

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from consilium.disk.atomic import write_file
from consilium.disk.files import DISK, Filesystem, write_failure
from consilium.records.io import STRICT, read_json, write_json

HEADER_FILE = "routing/loads.json"
LOADS_FILE = "routing/loads.bin"
STEP_BYTES = 8
COUNT_BYTES = 4
WINDOW = 50
"""Recorded steps at the end of a run over which balance is averaged, and experts without a token are dead."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoadsHeader:
    """The shape of every record."""

    schema_version: Literal[1] = 1
    layers: Annotated[tuple[int, ...], Field(min_length=1)]
    """Block index of each MoE layer, in order."""
    experts: PositiveInt
    dtype: Literal["int32"] = "int32"

    @property
    def record_bytes(self) -> int:
        return STEP_BYTES + COUNT_BYTES * len(self.layers) * self.experts


def max_over_mean(load_E: Sequence[float]) -> float:
    """Load of the busiest expert over its fair share; 1.0 is balance, NaN where nothing was routed."""
    total = sum(load_E)
    return max(load_E) * len(load_E) / total if total else float("nan")


@plain_dataclass(frozen=True, slots=True)
class FinalLoad:
    """How evenly the experts of one layer were used in the last WINDOW recorded steps."""

    ratio: float
    """max/mean of a step, mean over the steps that routed something; NaN where none did."""
    dead: tuple[int, ...]
    """Experts that no token reached in any of them."""


def final_load(load_SE: Sequence[Sequence[int]]) -> FinalLoad:
    """What one layer's steps came to, of which the last WINDOW count."""
    last_SE = load_SE[-WINDOW:]
    ratios = [ratio for ratio in map(max_over_mean, last_SE) if not math.isnan(ratio)]
    experts = zip(*last_SE, strict=True)
    return FinalLoad(
        ratio=sum(ratios) / len(ratios) if ratios else math.nan,
        dead=tuple(expert for expert, load_S in enumerate(experts) if not any(load_S)),
    )


@final
class LoadFile:
    """The load matrices of one run folder, open for appending."""

    def __init__(self, run: Path, header: LoadsHeader, files: Filesystem = DISK) -> None:
        self._path = run / LOADS_FILE
        self._header = header
        self._files = files

    @staticmethod
    def create(run: Path, *, layers: Sequence[int], experts: int, files: Filesystem = DISK) -> LoadFile:
        """Start an empty file, in the place of any there. Raises ConsiliumError when it cannot be written."""
        header = LoadsHeader(layers=tuple(layers), experts=experts)
        write_json(run / HEADER_FILE, header, files=files)
        write_file(run / LOADS_FILE, b"", files=files)
        return LoadFile(run, header, files)

    @staticmethod
    def open(run: Path, *, files: Filesystem = DISK) -> LoadFile:
        """Open what ``create`` started. Raises ConsiliumError when the header is missing or damaged."""
        return LoadFile(run, read_json(LoadsHeader, run / HEADER_FILE), files)

    @property
    def header(self) -> LoadsHeader:
        return self._header

    @property
    def path(self) -> Path:
        return self._path

    def __len__(self) -> int:
        """Whole records in the file."""
        return sum(1 for _ in self._steps())

    def append(self, step: int, load_LE: Sequence[Sequence[int]]) -> None:
        """Add one record with one write. After a crash, truncate first: records carry no marks."""
        counts = [count for load_E in load_LE for count in load_E]
        shape = (len(self._header.layers), self._header.experts)
        assert len(load_LE) == shape[0], f"{len(load_LE)} layers of loads, header has {shape[0]}"
        assert all(len(load_E) == shape[1] for load_E in load_LE), f"loads are not of {shape[1]} experts"
        try:
            self._files.append(self._path, struct.pack(f"<q{len(counts)}i", step, *counts))
        except OSError as error:
            raise write_failure(error, self._path) from error

    def read(self, first: int = 0) -> Iterator[tuple[int, tuple[tuple[int, ...], ...]]]:
        """Yield (step, load_LE) in file order from record ``first``; one cut by a crash is left out."""
        experts = self._header.experts
        unpack = struct.Struct(f"<q{len(self._header.layers) * experts}i")
        with self._path.open("rb") as file:
            file.seek(first * unpack.size)
            for _ in range(first, len(self)):
                step, *counts = unpack.unpack(file.read(unpack.size))
                yield step, tuple(tuple(counts[i : i + experts]) for i in range(0, len(counts), experts))

    def final(self) -> dict[int, FinalLoad]:
        """How each MoE layer, by its block index, was used at the end."""
        newest_SLE = [load_LE for _, load_LE in self.read(max(len(self) - WINDOW, 0))]
        return {
            layer: final_load([load_LE[row] for load_LE in newest_SLE])
            for row, layer in enumerate(self._header.layers)
        }

    def truncate(self, step: int) -> None:
        """Drop records after ``step`` and any torn tail, as a resume from that step's checkpoint needs."""
        keep = sum(1 for found in self._steps() if found <= step)
        try:
            self._files.truncate(self._path, keep * self._header.record_bytes)
            self._files.sync_file(self._path)
        except OSError as error:
            raise write_failure(error, self._path) from error

    def sync(self) -> None:
        """Make durable what was appended. Raises ConsiliumError where the disk fails."""
        try:
            self._files.sync_file(self._path)
        except OSError as error:
            raise write_failure(error, self._path) from error

    def _steps(self) -> Iterator[int]:
        """The steps of the whole records, in file order; NULs after a power cut would be a step 0."""
        if not self._path.exists():
            return
        size, before = self._header.record_bytes, 0
        with self._path.open("rb") as file:
            for offset in range(0, self._path.stat().st_size - size + 1, size):
                file.seek(offset)
                (step,) = struct.unpack("<q", file.read(STEP_BYTES))
                if step <= before:
                    return
                yield step
                before = step
