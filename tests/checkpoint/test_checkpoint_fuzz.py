"""Files that nobody wrote: whatever bytes a file is made of, it is read or refused in one sentence.

What is random is drawn from fixed seeds, so that a failure comes again.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from checkpoint.damage_text import YAML, scratch, spoil
from checkpoint.damage_weights import SINGLE
from consilium.checkpoint import safetensors_io
from consilium.config import io
from consilium.config.training import Training
from consilium.data.tokenizer import TOKENIZER_FILE, Tokenizer
from consilium.errors import ConsiliumError
from consilium.ops.gguf import read_header
from consilium.recipes.catalogue import recipe

SECONDS = 2.0
"""Of the processor, for this process and what it started."""
GGUF = "model.gguf"
Fuzz = Callable[[Path, random.Random], object]


def fuzz_safetensors(folder: Path, choose: random.Random) -> object:
    path = folder / SINGLE
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = folder / "header"
    header.write_bytes(data[8:end])
    spoil(header, choose)
    text = header.read_bytes()
    length = struct.pack("<Q", choose.choice([len(text), len(text), len(text), choose.randrange(2**64)]))
    path.write_bytes(length + text + data[end:])
    return safetensors_io.read(path)


def fuzz_gguf(folder: Path, choose: random.Random) -> object:
    path = folder / GGUF
    data = path.read_bytes()
    for _ in range(choose.randrange(1, 4)):
        if choose.random() < 0.5:
            place = choose.randrange(0, max(len(data) - 8, 1))
            number = choose.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, choose.randrange(2**16)])
            data = data[:place] + struct.pack("<Q", number) + data[place + 8 :]
        else:
            data = scratch(data, choose)
        data = data or b"GGUF"
    path.write_bytes(data)
    return read_header(path)


def fuzz_yaml(folder: Path, choose: random.Random) -> object:
    spoil(folder / YAML, choose)
    return io.read_yaml(Training, folder / YAML)


def fuzz_tokenizer(folder: Path, choose: random.Random) -> object:
    spoil(folder / TOKENIZER_FILE, choose)
    tokenizer = Tokenizer.load(folder)
    return tokenizer.decode(tokenizer.encode_template("a <|im_start|> für 你好 \0"))


FUZZERS: dict[str, tuple[Fuzz, int]] = {
    SINGLE: (fuzz_safetensors, 4000),
    GGUF: (fuzz_gguf, 4000),
    YAML: (fuzz_yaml, 1000),
    TOKENIZER_FILE: (fuzz_tokenizer, 1000),
}
"""By the file that is made up; the number is the budget of ``make test-slow``."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good file of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    tensors = {f"layers.{i}.weight": torch.ones(2, i + 1) for i in range(4)}
    safetensors_io.write(folder / SINGLE, tensors)
    (folder / YAML).write_text(io.to_yaml(Training(model=recipe("llama:tiny"), steps=3)))
    Tokenizer.of_bytes().save(folder)
    writer = gguf.GGUFWriter(folder / GGUF, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", ""])
    writer.add_array("tokenizer.ggml.scores", [0.0, 1.5, -2.0])
    writer.add_rope_freq_base(10_000.0)
    writer.add_tensor("blk.0.attn_q.weight", np.ones((2, 32), dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return folder


def failures(name: str, trials: int, whole: Path, folder: Path) -> list[str]:
    """Make ``trials`` files up; return those neither read nor refused in one sentence that names the file."""
    fuzz = FUZZERS[name][0]
    good = (whole / name).read_bytes()
    (folder / "tokenizer_config.json").write_bytes((whole / "tokenizer_config.json").read_bytes())
    found: list[str] = []
    for trial in range(trials):
        (folder / name).write_bytes(good)
        start = sum(os.times()[:4])
        said = outcome(fuzz, folder, random.Random(f"{name} {trial}"), name)
        if said or sum(os.times()[:4]) - start > SECONDS:
            found.append(f"{name} {trial}: {said or 'too slow'}")
    return found


def outcome(fuzz: Fuzz, folder: Path, choose: random.Random, name: str) -> str:
    try:
        fuzz(folder, choose)
    except ConsiliumError as error:
        text = str(error)
        clear = str(folder / name) in text and text.isprintable() and len(text) < 2000
        return "" if clear else f"unclear: {text[:300]!r}"
    except Exception as error:  # noqa: BLE001 - any other type is the failure that is looked for
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("name", FUZZERS)
def test_made_up_files_are_read_or_refused_in_one_sentence(name: str, whole: Path, tmp_path: Path) -> None:
    assert not failures(name, FUZZERS[name][1] // 100, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FUZZERS)
def test_thousands_of_made_up_files_are_read_or_refused_in_one_sentence(
    name: str, whole: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    trials = FUZZERS[name][1]
    found = failures(name, trials, whole, tmp_path)
    record_property("trials", trials)
    record_property("failures", len(found))
    assert not found
