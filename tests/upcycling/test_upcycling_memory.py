"""Peak memory in a process of its own: a layer at a time, whatever the number of layers; a 7 B model too."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import pytest
import torch
from torch import Tensor

from consilium.checkpoint import store
from consilium.checkpoint.convert import fill_folder
from consilium.config.attention import GQA
from consilium.config.feed_forward import FeedForward
from consilium.config.generation import GenerationDefaults
from consilium.config.model import Model
from consilium.config.upcycling import RandomSplit, Upcycling, VirtualGroup
from consilium.data.tokenizer import Tokenizer
from consilium.model.build import build
from consilium.planner.parameters import parameters
from consilium.planner.upcycled import upcycled
from consilium.recipes.catalogue import recipe
from upcycling.sources import LLAMA, saved, text

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads the peak memory of Linux"
)

CHILD = """
import pathlib, sys
import torch
from consilium.cli.main import main

def peak():
    return int(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) * 1024

small, large, *words = sys.argv[1:]
assert main(['upcycle', small, large + '-warm', *words]) == 0
pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak starts again from here
before = peak()
assert main(['upcycle', large, large + '-moe', *words, '--json']) == 0
print(peak() - before)
"""


def peak(small: Path, large: Path, *words: str) -> tuple[int, str]:
    """Bytes that upcycling ``large`` takes at its peak, everything imported before, and what was said."""
    command = [sys.executable, "-c", CHILD, str(small), str(large), *words]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout.splitlines()[-1]), ended.stdout + ended.stderr


def deep(layers: int) -> Model:
    """3.2 MB of float32 a layer, and small ends."""
    attention = GQA(heads=4, kv_heads=2, head_dim=32)
    return dataclasses.replace(
        LLAMA, hidden_size=128, layers=layers, attention=attention, dense=FeedForward(width=2048)
    )


@pytest.mark.parametrize("method", ["copy", "split-inner"])
def test_memory_holds_a_layer_and_not_the_model(method: str, tmp_path: Path) -> None:
    saved(LLAMA, tmp_path / "small")
    words = ["--method", method, "--experts", "4", "--top-k", "2", "--threads", "1"]
    words += ["--data", str(text(tmp_path / "a.txt")), "--set", "calibration_tokens=256"]
    found: dict[int, int] = {}
    for layers in (4, 20):
        store.save(build(deep(layers)), tmp_path / str(layers), tokenizer=Tokenizer.of_bytes())
        found[layers], _ = peak(tmp_path / "small", tmp_path / str(layers), *words)
    layer = 4 * 3 * 128 * 2048
    # Of 16 more layers: none is kept; gradients keep the text's states before each, a tenth of a layer.
    assert found[20] < found[4] + (4 if method == "split-inner" else 2) * layer, found
    assert found[20] < 20 * layer, "less than the source itself, and far less than the result"


@final
@dataclass(frozen=True, slots=True)
class Drawn:
    """A ``Source`` of random weights, of which a tensor at a time is in memory."""

    config: Model
    state: Mapping[str, Tensor]
    generation: GenerationDefaults = GenerationDefaults()

    def fill(self, name: str, target: Tensor) -> None:
        target.copy_(self.read(name))

    def fill_rows(self, name: str, target: Tensor, first: int) -> None:
        target.copy_(self.read(name)[first : first + target.shape[0]])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.empty(self.state[name].shape, dtype=torch.bfloat16)
        drawn = drawn.normal_(std=0.02) if drawn.ndim > 1 else drawn.fill_(1.0)
        return drawn.to(dtype or self.state[name].dtype)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """Pytest keeps folders of failed tests, and this one holds tens of gigabytes."""
    with tempfile.TemporaryDirectory(dir=tmp_path) as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(Upcycling(method=RandomSplit(), experts=8, top_k=2), id="split-random"),
        pytest.param(Upcycling(method=VirtualGroup(granularity=4), experts=2, top_k=4), id="virtual-group"),
    ],
)
def test_a_model_of_seven_billion_goes_through(asked: Upcycling, room: Path) -> None:
    """Llama 2 7B's shape in bfloat16, 13 GB: within the source and a layer, and far within 24 GiB."""
    config = dataclasses.replace(recipe("llama", "7b"), max_length=512)
    source, result = 2 * parameters(config).total, 2 * parameters(upcycled(config, asked)).total
    if shutil.disk_usage(room).free < 1.1 * (source + result):
        pytest.skip(f"needs {1.1 * (source + result) / 1e9:.0f} GB of disk")
    (room / "large").mkdir()
    tokenizer = Tokenizer.of_bytes().files()
    fill_folder(
        room / "large",
        Drawn(config, build(config, dtype="bfloat16", device="meta").state_dict()),
        beside=tokenizer,
    )
    saved(LLAMA, room / "small")
    method = asked.method
    words = ["--method", method.kind, "--experts", str(asked.experts), "--top-k", str(asked.top_k)]
    words += ["--granularity", "4"] if isinstance(method, VirtualGroup) else []
    words += ["--data", str(text(room / "a.txt")), "--set", "calibration_tokens=256"]
    taken, said = peak(room / "small", room / "large", *words)
    found = json.loads(next(line for line in said.splitlines() if line.startswith('{"written"')))
    assert found["kept"]
    assert (found["certificate"]["promise"] is None) == isinstance(method, RandomSplit)
    assert "writing" in said, "progress is shown"
    written = sum(path.stat().st_size for path in (room / "large-moe").glob("*.safetensors"))
    assert written == pytest.approx(result, rel=1e-3)
    assert taken < source / 3
    print(f"{method.kind}: peak {taken / 2**30:.1f} GiB of a source of {source / 2**30:.1f} GiB")
