"""``consilium convert``: choose the writer, show how far it is, say what came out."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import final

from consilium.checkpoint.convert import convert
from consilium.checkpoint.folders import checkpoint_in
from consilium.errors import ConsiliumError, nearest
from consilium.model.build import DTYPES

_QUIET_SECONDS = 2.0
"""A conversion that is over by then says nothing on the way."""


def run(options: Namespace) -> int:
    source = checkpoint_in(options.source)
    if source.resolve() in options.destination.resolve().parents:
        raise ConsiliumError(
            f"convert: {options.destination} lies inside {source}, which would no longer be what was saved;"
            " choose a place outside."
        )
    writers = {"hf": _to_folder, "gguf": _to_gguf}
    shown = Shown()
    start = time.monotonic()
    try:
        lines = writers[options.to](source, options.destination, options.dtype, shown)
    finally:
        shown.end()
    print(f"{options.destination}  {_size(options.destination)}  {time.monotonic() - start:.1f} s")
    for line in lines:
        print(f"  {line}")
    return 0


@final
class Shown:
    """One line on standard error that says how much is done, from two seconds on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = clock() + _QUIET_SECONDS
        self._used = False

    def __call__(self, done: int, total: int) -> None:
        if self._clock() >= self._next:
            print(f"\r{done / total:4.0%} of {total / 1e9:,.2f} GB", end="", file=sys.stderr, flush=True)
            self._next = self._clock() + 0.5
            self._used = True

    def end(self) -> None:
        if self._used:
            print(file=sys.stderr)


def _to_folder(source: Path, destination: Path, dtype: str | None, shown: Shown) -> tuple[str, ...]:
    if dtype is not None and dtype not in DTYPES:
        gguf = " Types such as q8_0 are for --to gguf." if dtype.lower().startswith("q") else ""
        raise ConsiliumError(f"convert: unknown --dtype {dtype!r}.{gguf or nearest(dtype, DTYPES)}")
    if destination.suffix == ".gguf":
        raise ConsiliumError(f"convert: {destination} would be a folder; add --to gguf to write a GGUF file.")
    convert(source, destination, dtype=dtype, progress=shown)
    return (f"opens with consilium.load({str(destination)!r})",)


def _to_gguf(source: Path, destination: Path, dtype: str | None, shown: Shown) -> tuple[str, ...]:
    if destination.suffix != ".gguf":
        raise ConsiliumError(
            f"convert: {destination} is no name of a GGUF file; give one that ends in .gguf."
        )
    from consilium.checkpoint.gguf.export import export

    done = export(source, destination, dtype=dtype, progress=shown)
    return (f"{done.typed:.1%} of the values are of this type, the others float32", *done.notices)


def _size(destination: Path) -> str:
    paths = [destination] if destination.is_file() else [p for p in destination.rglob("*") if p.is_file()]
    return f"{sum(path.stat().st_size for path in paths) / 1e6:,.1f} MB"
