"""The native kernels of every tier that this processor runs, compiled once for all tests of a run."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest

from consilium.ops.native.compile import VARIABLE, Built, Missing, Tier, built, tiers
from consilium.ops.native.library import Kernels, opened

HERE = tiers()


@functools.cache
def compiled(tier: Tier) -> Built | Missing:
    folder = Path(tempfile.gettempdir()) / f"consilium-test-kernels-{Path.home().name}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, tier)
        return built(folder)


def kernels_of(tier: Tier) -> Kernels:
    """Skips where there is no compiler, which alone is no fault; a compiler that fails is one."""
    found = compiled(tier)
    if isinstance(found, Missing) and found.reason.startswith("there is no"):
        pytest.skip(found.reason)
    assert isinstance(found, Built), found
    return opened(found.path, tier)
