"""bench/decode.py times steps alone, and makes for llama.cpp the file that it names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import pytest
import torch

from consilium.checkpoint import store
from consilium.checkpoint.gguf.export import export
from consilium.config.model import MTP
from consilium.data.tokenizer import Tokenizer
from house.scripts import loaded
from small import DEEPSEEK, lively


def test_a_contestant_adds_tokens_to_every_sequence() -> None:
    with loaded("bench/decode.py") as bench:
        setting = bench.Setting(dataclasses.replace(DEEPSEEK, max_length=64), batch=3, context=20)
        assert [len(prompt) for prompt in setting.prompts()] == [20] * 3
        run = bench.ours(lively(setting.model), setting)
        assert run(4) > 0
        assert run(4) > 0


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_requantised_file_holds_the_same_values_in_fewer_bits(kind: str, tmp_path: Path) -> None:
    model = lively(dataclasses.replace(DEEPSEEK, hidden_size=64, mtp=MTP()))
    store.save(model, tmp_path / "model", tokenizer=Tokenizer.of_bytes())
    export(tmp_path / "model", tmp_path / "whole.gguf")
    with loaded("bench/decode.py") as bench:
        bench.requantised(tmp_path / "whole.gguf", tmp_path / "small.gguf", kind)
    whole, small = (gguf.GGUFReader(tmp_path / name) for name in ("whole.gguf", "small.gguf"))
    assert whole.fields.keys() == small.fields.keys()
    kinds = set()
    for before, after in zip(whole.tensors, small.tensors, strict=True):
        assert before.name == after.name
        kinds.add(after.tensor_type.name)
        right, found = (
            torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in (before, after)
        )
        assert (found - right).norm() <= 0.2 * right.norm()
    assert kinds == {kind, "F32"}
