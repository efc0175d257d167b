"""The native kernels under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import HERE, kernels_of


@pytest.mark.slow
def test_kernels_touch_no_memory_but_their_own(tmp_path: Path) -> None:
    """Under the address and undefined-behaviour sanitizers, which end the process at the first fault."""
    kernels_of(HERE[-1])
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in ("libasan.so", "libstdc++.so")
    ]
    preloaded = [done.stdout.strip() for done in libraries]
    if not all(Path(library).is_absolute() for library in preloaded):
        pytest.skip("the compiler has no address sanitizer")
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0"}
    environment["PYTHONPATH"] = os.pathsep.join((str(tests.parent / "src"), str(tests)))
    script = [sys.executable, str(tests / "model" / "sanitized.py"), str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip().endswith("clean"), done.stderr[-2000:]
