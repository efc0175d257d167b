"""Runs that are killed at random moments, once or again and again, reach the same bits in every cell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from training.test_training_resume import text

__all__ = ["text"]

TESTS = Path(__file__).parent.parent
SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]
CELLS = tuple(f"{kind}-{dtype}" for kind in ("adamw", "muon", "int8") for dtype in ("float32", "bfloat16"))


@pytest.mark.parametrize(
    ("stops", "chained", "cells"),
    [
        pytest.param(2, 0, CELLS, id="2 stops a cell", marks=pytest.mark.timeout(600)),
        pytest.param(0, 5, ("muon-float32",), id="a chain of 5", marks=pytest.mark.timeout(300)),
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
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(TESTS / "training/kills.py"), tmp_path, text, str(stops), str(chained), *cells],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    runs = sum(cell["runs"] for cell in found.values())
    wrong = sum(cell["wrong"] for cell in found.values())
    record_property("trials", runs)
    record_property("failures", wrong)
    assert runs == len(cells) * (stops + (chained > 0))
    assert wrong == 0, (found, done.stderr)
