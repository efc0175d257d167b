"""Runs that are killed at random moments, once or again and again, reach the same bits in every cell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.test_training_resume import text

__all__ = ["text"]

TESTS = Path(__file__).parent.parent
SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]
DTYPES = ("float32", "bfloat16")
CELLS = tuple(f"{kind}-{dtype}-alone" for kind in ("adamw", "muon", "int8") for dtype in DTYPES)


@pytest.mark.parametrize(
    ("stops", "chained", "cells"),
    [
        pytest.param(2, 0, CELLS, id="2 stops a cell", marks=pytest.mark.timeout(600)),
        pytest.param(0, 5, ("muon-float32-alone",), id="a chain of 5", marks=pytest.mark.timeout(300)),
        pytest.param(20, 5, CELLS, id="20 stops and a chain a cell", marks=SLOW),
    ],
)
def test_killed_runs_reach_the_hash_of_the_whole_run(
    stops: int,
    chained: int,
    cells: tuple[str, ...],
    text: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    killed_as_the_whole(tmp_path, text, (stops, chained), cells, record_property)


def killed_as_the_whole(
    folder: Path,
    text: Path,
    kills: tuple[int, int],
    cells: tuple[str, ...],
    record: Callable[[str, object], None],
) -> None:
    """``kills``: how many runs of a cell are killed once, and how often one more is."""
    stops, chained = kills
    found = run_apart("kills.py", folder, text, stops, chained, *cells)
    runs, wrong = (sum(cell[name] for cell in found.values()) for name in ("runs", "wrong"))
    record("trials", runs)
    record("failures", wrong)
    assert runs == len(cells) * (stops + (chained > 0))
    assert wrong == 0, found


def run_apart(script: str, *arguments: object) -> dict[str, Any]:
    """The JSON that a script beside this file prints, in a process that forks what it tries."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(TESTS / "training" / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
