"""All tokens of two processes to the experts of one: what its memory bears, and what a capacity drops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.overload import PROCESS, TOKENS, planned


@pytest.mark.skipif(not (PROCESS / "clear_refs").exists(), reason="Linux alone tells the peak of a pass")
def test_a_process_that_gets_every_token_takes_what_is_planned_or_drops_the_rest_and_counts_it() -> None:
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join((str(tests), str(tests.parent / "src")))
    script = [sys.executable, str(tests / "moe" / "overload.py")]
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(script, capture_output=True, text=True, check=True, env=environment, timeout=300)
    used = json.loads(done.stdout)
    (first, second), even = used["all"], used["even"]
    assert first < planned(2 * TOKENS)
    assert first > 1.5 * even[0], "the measure sees the difference"
    assert second < even[1]
    assert used["dropping"][0] < planned(TOKENS)
