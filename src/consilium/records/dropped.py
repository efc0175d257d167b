"""``dropped.jsonl``: the texts that filters took out of a run's data, one a line, best score last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic.dataclasses import dataclass

from consilium.errors import ConsiliumError
from consilium.records.io import STRICT, from_json, to_json, write_text

DROPPED_FILE: Final = "dropped.jsonl"


@dataclass(frozen=True, config=STRICT)
class Dropped:
    """A text that a filter took out."""

    name: str
    domain: str
    filter: str
    score: float
    """Chance of being worth to be kept, as the filter sees it."""


def write_dropped(run: Path, dropped: Sequence[Dropped]) -> None:
    """Raises ConsiliumError where the folder cannot be written."""
    listed = sorted(dropped, key=lambda one: (one.filter, one.score, one.domain, one.name))
    write_text(run / DROPPED_FILE, "".join(f"{to_json(one, indent=None)}\n" for one in listed))


def read_dropped(run: Path) -> list[Dropped]:
    """Return what was dropped; nothing where nothing was. Raises ConsiliumError for a damaged file."""
    path = run / DROPPED_FILE
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise ConsiliumError(f"cannot read {path}: {error.strerror}; give the folder of a run.") from None
    return [from_json(Dropped, line, where=f"{path}, line {i}") for i, line in enumerate(lines, start=1)]
