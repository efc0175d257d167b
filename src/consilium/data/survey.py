"""What is known of texts without reading them again, kept in the cache.

Legend: N texts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from consilium.config.data import Filter
from consilium.config.io import to_data
from consilium.data.documents import Text, stable_fraction, unit_fraction
from consilium.data.filters import VERSION, Sieve
from consilium.data.forms import canonical
from consilium.data.store import array_bytes, entry_is_whole, open_array, write_entry
from consilium.disk.files import cache_folder
from consilium.errors import ConsiliumError
from consilium.records.dropped import Dropped

FORMAT: Final = 2
"""Version of a survey; changes when the same files would be read in another way."""
_INDEX: Final = "index.json"
_ARRAYS: Final = ("domain", "unit", "order", "characters", "plain")
_SETTLED: Final = 2.0
"""Seconds without a change after which size, times and inode tell whether a file has changed, as in git's
index: a time of writing alone is what archives and copies set."""


@dataclass(frozen=True, slots=True)
class Shelf:
    """Texts that are surveyed and encoded together: a large file, some small ones, or the built-in text."""

    read: Callable[[], Iterator[Text]]
    """Always the same texts in the same order, none of them blank."""
    files: tuple[Path, ...]
    """What they are read from; none where that is cheap."""
    names: tuple[str, ...]
    """Of the files, and whatever else decides what is read."""
    source: int
    """By its place in ``Data.sources``."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Of the texts of a shelf, in the order in which they are read."""

    sha256: str
    """Of their names, domains and contents."""
    domains: tuple[str, ...]
    domain_N: NDArray[np.int32]
    unit_N: NDArray[np.float64]
    order_N: NDArray[np.float64]
    """``stable_fraction`` of the names, by which samples are drawn."""
    characters_N: NDArray[np.int64]
    plain_N: NDArray[np.bool_]
    dropped: Mapping[int, Dropped] = field(default_factory=dict)
    """By place among all texts that are read; the numbers are those of the others."""


def survey(shelf: Shelf, filters: Sequence[Filter] = ()) -> Survey:
    """Read the texts of ``shelf``, or take what was found from the cache where its files are unchanged.

    Raises ConsiliumError for unusable text.
    """
    status = [path.stat() for path in shelf.files]
    settled = bool(status) and max(one.st_mtime for one in status) < time.time() - _SETTLED
    stamps = [
        [str(path.resolve()), one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino]
        for path, one in zip(shelf.files, status, strict=True)
    ]
    sieve = [VERSION, sys.version_info[:2], [to_data(chosen) for chosen in filters]] if filters else []
    key = hashlib.sha256(json.dumps([FORMAT, shelf.names, stamps, sieve]).encode()).hexdigest()
    folder = cache_folder() / "surveys" / key
    if settled and entry_is_whole(folder):
        return _read(folder)
    found = _survey(shelf, Sieve(filters))
    if settled:
        _keep(found, folder)
    return found


def _survey(shelf: Shelf, sieve: Sieve) -> Survey:
    digest, columns = Digest(), _Columns()
    dropped: dict[int, Dropped] = {}
    for place, text in enumerate(shelf.read()):
        if (found := sieve.dropped(text)) is not None:
            dropped[place] = found
            continue
        digest.add(text)
        columns.add(text)
    return columns.survey(digest.hexdigest(), dropped)


@final
class Digest:
    """Of texts, each part preceded by its length, so that no two sequences of texts collide."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, text: Text) -> None:
        for data in (text.domain.encode(), text.name.encode(), text.unit.encode(), canonical(text.content)):
            self._digest.update(len(data).to_bytes(8, "big"))
            self._digest.update(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


@final
class _Columns:
    """Numbers of millions of texts in tens of bytes each."""

    def __init__(self) -> None:
        self._domains: dict[str, int] = {}
        self._domain, self._unit, self._order = array("i"), array("d"), array("d")
        self._characters, self._plain = array("q"), array("b")

    def add(self, text: Text) -> None:
        self._domain.append(self._domains.setdefault(text.domain, len(self._domains)))
        self._unit.append(unit_fraction(text.unit))
        self._order.append(stable_fraction(text.name, salt="sample"))
        self._characters.append(len(text.text))
        self._plain.append(isinstance(text.content, str))

    def survey(self, sha256: str, dropped: Mapping[int, Dropped]) -> Survey:
        return Survey(
            sha256,
            tuple(self._domains),
            np.array(self._domain, dtype=np.int32),
            np.array(self._unit, dtype=np.float64),
            np.array(self._order, dtype=np.float64),
            np.array(self._characters, dtype=np.int64),
            np.array(self._plain, dtype=np.bool_),
            dropped,
        )


def _keep(found: Survey, folder: Path) -> None:
    """Whoever cannot write the cache reads the text again."""
    dropped = [[place, *dataclasses.astuple(one)] for place, one in found.dropped.items()]
    index = {"sha256": found.sha256, "domains": found.domains, "dropped": dropped}
    files = {f"{name}.npy": array_bytes(getattr(found, f"{name}_N")) for name in _ARRAYS}
    try:
        write_entry(folder, files | {_INDEX: json.dumps(index).encode()})
    except ConsiliumError:
        return


def _read(folder: Path) -> Survey:
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    domain_N, unit_N, order_N, characters_N, plain_N = (
        open_array(folder / f"{name}.npy") for name in _ARRAYS
    )
    dropped = {place: Dropped(*rest) for place, *rest in index["dropped"]}
    return Survey(
        index["sha256"], tuple(index["domains"]), domain_N, unit_N, order_N, characters_N, plain_N, dropped
    )
