"""bench/mla.py measures every size of the cache, and finds no loss where nothing is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from house.scripts import loaded
from upcycling.sources import LLAMA, saved


def test_the_study_shows_loss_and_cache_of_each_size(tmp_path: Path) -> None:
    saved(LLAMA, tmp_path / "dense")
    with loaded("bench/mla.py") as bench:
        study = bench.study_of(tmp_path / "dense", 64)
        assert study.calibration
        assert study.measured
        found = list(bench.figures(study))
        asked = list(bench.methods(study.attention))
    losses, caches = found[::2], found[1::2]
    assert len(losses) == len(caches) == len(asked)
    assert losses[0].ratio == pytest.approx(1, abs=1e-4)
    assert caches[0].ratio == 1
    for method, loss, cache in zip(asked, losses, caches, strict=True):
        assert loss.name == f"rope_dim {method.rope_dim}, kv_rank {method.kv_rank}: loss"
        assert cache.median == 2 * LLAMA.layers * (method.rope_dim + method.kv_rank)
