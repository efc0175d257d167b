"""Peak memory, measured in a process of its own: a model once, and one tensor of it where none is kept."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint.models import deepseek_v3
from consilium.checkpoint import safetensors_io, store
from consilium.config.model import Model
from consilium.config.moe import AlwaysOn
from consilium.model.build import build
from consilium.planner.parameters import parameters

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads the peak memory of Linux"
)
MOST = 1.15
"""Peak of a load beside the model's own size."""

CHILD = """
import pathlib, sys
import torch
from consilium.checkpoint import store
from consilium.checkpoint.convert import convert

def peak():
    return int(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) * 1024

def load(source):
    return store.load(source, dtype=sys.argv[3])

def save(source):
    store.save(model, pathlib.Path(source).with_name(f'saved-{pathlib.Path(source).name}'))

def rewrite(source):
    source = pathlib.Path(source)
    convert(source, source.with_name(f'converted-{source.name}'), dtype=sys.argv[3])

torch.set_num_threads(1)
action = {'load': load, 'save': save, 'convert': rewrite}[sys.argv[1]]
model = load(f'{sys.argv[2]}/small')
action(f'{sys.argv[2]}/small')
model = load(f'{sys.argv[2]}/large') if action is save else None
pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak starts again from here
before = peak()
result = action(f'{sys.argv[2]}/large')
print(peak() - before)
"""


def peak(action: str, folder: Path, dtype: str) -> int:
    """Bytes that ``action`` on ``folder/large`` takes at its peak, everything imported before."""
    command = [sys.executable, "-c", CHILD, action, str(folder), dtype]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def wide(layers: int) -> Model:
    """25 million weights a pair of layers, most of them in experts."""
    config = deepseek_v3()
    assert config.moe is not None
    moe = dataclasses.replace(config.moe, experts=16, width=512, shared=AlwaysOn(count=1, width=512))
    return dataclasses.replace(config, hidden_size=512, layers=layers, moe=moe)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in folders of both dtypes, beside a small one that brings everything in."""
    folders: dict[str, Path] = {}
    for dtype in ("float32", "bfloat16"):
        folders[dtype] = tmp_path_factory.mktemp(dtype)
        store.save(build(wide(3), dtype=dtype), folders[dtype] / "large")
        store.save(build(deepseek_v3(), dtype=dtype), folders[dtype] / "small")
    return folders


def size(config: Model, dtype: str) -> int:
    return parameters(config).total * {"float32": 4, "bfloat16": 2}[dtype]


SAME = pytest.param("float32", "float32", marks=pytest.mark.slow)
WIDER = pytest.param("bfloat16", "float32")


@pytest.mark.parametrize(("written", "dtype"), [SAME, WIDER, ("float32", "bfloat16")])
def test_loading_needs_little_more_memory_than_the_model(
    written: str, dtype: str, stored: dict[str, Path]
) -> None:
    ratio = peak("load", stored[written], dtype) / size(wide(3), dtype)
    assert 0.9 < ratio <= MOST


def test_saving_needs_no_second_copy(stored: dict[str, Path]) -> None:
    assert peak("save", stored["float32"], "float32") < 0.1 * size(wide(3), "float32")


@pytest.mark.parametrize(("written", "dtype"), [SAME, WIDER])
def test_converting_needs_far_less_memory_than_the_model(
    written: str, dtype: str, stored: dict[str, Path]
) -> None:
    assert peak("convert", stored[written], dtype) < 0.1 * size(wide(3), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("layers", [5, 17])
@pytest.mark.parametrize("written", ["bfloat16", "float8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_a_few_hundred_megabytes_needs_little_more(
    written: str, dtype: str, layers: int, tmp_path: Path
) -> None:
    for name, config in (("large", wide(layers)), ("small", deepseek_v3())):
        store.save(build(config, dtype="bfloat16"), tmp_path / name)
        if written == "float8":
            to_float8(tmp_path / name)
    ratio = peak("load", tmp_path, dtype) / size(wide(layers), dtype)
    assert 0.9 < ratio <= MOST


def to_float8(folder: Path) -> None:
    """Rewrite the projections of ``folder`` as DeepSeek publishes them; what they hold does not matter."""
    file = folder / "model.safetensors"
    tensors = safetensors_io.read(file)
    for name in [name for name in tensors if "_proj" in name]:
        rows, columns = tensors[name].shape
        tensors[f"{name}_scale_inv"] = torch.ones(math.ceil(rows / 128), math.ceil(columns / 128))
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    file.unlink()
    safetensors_io.write(file, tensors)
    (folder / "manifest.json").unlink()
