"""What a bench does with its record: shows it, and writes it where that was asked for."""

from __future__ import annotations

from pathlib import Path

from consilium.records.bench import BenchRecord
from consilium.records.io import to_json, write_json


def keep(made: BenchRecord, out: Path | None) -> None:
    print(to_json(made))
    if out is not None:
        write_json(out, made)
