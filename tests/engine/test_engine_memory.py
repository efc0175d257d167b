"""Generating takes the memory of the weights, in any format, and little beside."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from consilium.checkpoint import store
from consilium.config.model import MTP
from consilium.data.tokenizer import Tokenizer
from consilium.model.build import build
from consilium.ops.native.compile import VARIABLE
from consilium.recipes import catalogue
from kernels import HERE, kernels_of

GENERATE = """
import json, sys
from consilium.checkpoint import store
from consilium.engine.engine import Engine
model = store.load(sys.argv[1], weights=sys.argv[2] or None)
Engine(model).complete([list(range(3, 130))], max_tokens=16)
held = [*model.parameters(), *model.buffers()]
with open("/proc/self/status") as status:  # a process's rusage begins with the peak of who started it
    peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
print(json.dumps([int(peak) * 1024, sum(t.nbytes for t in held)]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = dataclasses.replace(catalogue.recipe("deepseek-v3", "1b"), mtp=MTP(), max_length=512)
    made = tmp_path_factory.mktemp("memory") / "model"
    store.save(build(config, seed=0, dtype="bfloat16"), made, tokenizer=Tokenizer.of_bytes())
    return made


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process its peak")
@pytest.mark.parametrize("packing", ["", "int8", "int4", "fp8"])
def test_peak_is_that_of_the_weights(packing: str, folder: Path) -> None:
    """With kernels, which unpack nothing: 1.1 times the weights, and 0.4 GiB for all else."""
    command = [sys.executable, "-c", GENERATE, str(folder), packing]
    kernels_of(HERE[-1])
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    peak, weights = json.loads(done.stdout)
    assert weights > 6e8
    assert peak < 1.1 * weights + 0.4 * 2**30
