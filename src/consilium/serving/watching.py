"""The training runs below one folder, for somebody who looks at them while they go on.

What lies in a folder may be damaged, huge, half written, or lead elsewhere: it is looked at before it is
read.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, final

from consilium.errors import ConsiliumError
from consilium.records.io import read_json, read_json_if_present
from consilium.records.loads import HEADER_FILE, LOADS_FILE, LoadsHeader
from consilium.records.metrics import METRICS_FILE
from consilium.records.run import CONFIG_FILE, META_FILE, SUMMARY_FILE, RunMeta
from consilium.records.specialisation import SPECIALISATION_FILE
from consilium.report.compare import is_run, runs_in
from consilium.report.live import pieces
from consilium.report.source import read_run
from consilium.serving.body import Refused

DEPTH: Final = 4
"""Of folders in one another that are searched for runs."""
MOST_RUNS: Final = 500
MOST_CELLS: Final = 2**17
"""Experts of all layers whose loads are drawn."""
LIVELY_SECONDS: Final = 120
"""A run that wrote something within them is taken to go on."""
LARGEST: Final[Mapping[str, int]] = MappingProxyType(
    {
        CONFIG_FILE: 2**20,
        META_FILE: 2**20,
        SUMMARY_FILE: 2**22,
        SPECIALISATION_FILE: 2**24,
        METRICS_FILE: 2**25,
        HEADER_FILE: 2**16,
        LOADS_FILE: 2**28,
    }
)
"""Bytes of each file of a run that a server reads between two answers; ``consilium report`` reads any."""

Object = dict[str, Any]


@final
@dataclass(frozen=True, slots=True)
class Look:
    """What there is to see of a run now; ``mark`` is the same until one of its files changes."""

    mark: str
    folders: tuple[Path, ...]

    def pieces(self) -> Object:
        """Raises ConsiliumError for a record that is damaged."""
        began = time.monotonic()
        found = pieces(*(read_run(folder) for folder in self.folders))
        return _finite(found | {"seconds": round(time.monotonic() - began, 3)})


@final
@dataclass(frozen=True, slots=True)
class Runs:
    """The runs below ``folder``, or the one that it is; none where there is no folder."""

    folder: Path | None

    def listing(self) -> list[Object]:
        """Names, models and states, the newest first."""
        found = [_told(name, run) for name, run in self._named()]
        return sorted(found, key=lambda one: -one["changed"])

    def look(self, name: str, beside: str | None = None) -> Look:
        """Raises Refused for a name that ``listing`` does not have, and for files that are not read here."""
        known = dict(self._named())
        folders: list[Path] = []
        for asked in (name, *(() if beside is None else (beside,))):
            if asked not in known:
                raise Refused(404, f"there is no run {asked[:200]!r} here", param="name")
            folders.append(known[asked])
        root = Path() if self.folder is None else self.folder.resolve()
        marks = [mark for folder in folders for mark in _marks(folder, root)]
        return Look(hashlib.sha256(repr(marks).encode()).hexdigest()[:32], tuple(folders))

    def _named(self) -> Iterator[tuple[str, Path]]:
        """Runs that exist, by the way to them: a name is looked up here and never made into a path."""
        if self.folder is None or not self.folder.is_dir():
            return
        if is_run(self.folder):
            yield self.folder.resolve().name, self.folder
            return
        try:
            for run in islice(runs_in(self.folder, DEPTH), MOST_RUNS):
                yield run.relative_to(self.folder).as_posix(), run
        except OSError as error:
            raise ConsiliumError(
                f"cannot look into {error.filename} ({error.strerror}); name a folder that can be read."
            ) from None


def _told(name: str, run: Path) -> Object:
    changed = max((_changed(run / file) for file in LARGEST), default=0.0)
    return {"name": name, "model": _model(run), "state": _state(run, changed), "changed": changed}


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _state(run: Path, changed: float) -> str:
    if (run / SUMMARY_FILE).exists():
        return "finished"
    return "running" if time.time() - changed < LIVELY_SECONDS else "stopped"


def _model(run: Path) -> str | None:
    """None where it is not told, or not in a way that is read here."""
    try:
        _check(run, META_FILE, run.resolve())
        meta = read_json_if_present(RunMeta, run / META_FILE)
    except (Refused, ConsiliumError):
        return None
    return None if meta is None else meta.model


def _marks(run: Path, root: Path) -> Iterator[tuple[str, int, int]]:
    """Names, times and sizes of its files. Raises Refused for one that is not read here."""
    for name in LARGEST:
        found = _check(run, name, root)
        if found is not None:
            yield f"{run}/{name}", found.st_mtime_ns, found.st_size
    if (run / HEADER_FILE).exists():
        header = read_json(LoadsHeader, run / HEADER_FILE)
        if len(header.layers) * header.experts > MOST_CELLS:
            raise Refused(400, f"{run / HEADER_FILE} tells of more than {MOST_CELLS:,} experts in all layers")


def _check(run: Path, name: str, root: Path) -> os.stat_result | None:
    path = run / name
    try:
        inside = path.resolve().is_relative_to(root)
        found = path.stat()
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        raise Refused(400, f"cannot look at {path}: {error}") from None
    if not inside:
        raise Refused(400, f"{path} leads out of the folder of runs, so it is not read")
    if not stat.S_ISREG(found.st_mode):
        raise Refused(400, f"{path} is no ordinary file, so it is not read")
    if found.st_size > LARGEST[name]:
        raise Refused(
            400,
            f"{path} has {found.st_size:,} bytes, more than the {LARGEST[name]:,} that are read here;"
            " consilium report draws it",
        )
    return found


def _finite(value: Any) -> Any:
    """JSON has no word for what is not finite but null."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(one) for key, one in value.items()}
        case list() | tuple():
            return [_finite(one) for one in value]
        case _:
            return value
