"""Sliding windows in GGUF files: written, read back, and refused where nothing says that they are used."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from checkpoint.gguf_models import CASES, GROUPED, dense, llama, mixtral
from checkpoint.models import trained
from checkpoint.test_checkpoint_gguf_read import file_of, logits
from consilium.checkpoint import store
from consilium.checkpoint.convert import convert
from consilium.checkpoint.gguf.export import export
from consilium.checkpoint.gguf.keys import model_of
from consilium.config.attention import GQA
from consilium.config.model import Model
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError
from consilium.ops.gguf import read_header
from support import relative_error


@pytest.mark.parametrize("config", [llama(), mixtral()], ids=["mistral", "mixtral"])
def test_a_window_comes_back(config: Model, tmp_path: Path) -> None:
    windowed = dataclasses.replace(GROUPED, window=7)
    model, path = file_of(tmp_path, dataclasses.replace(config, attention=windowed))
    again = store.load(path)
    assert isinstance(again.config.attention, GQA)
    assert again.config.attention.window == 7
    assert relative_error(logits(again), logits(model)) < 1e-6
    convert(path, tmp_path / "again")
    assert torch.equal(logits(store.load(tmp_path / "again")), logits(again))


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    windowed = dataclasses.replace(GROUPED, window=256)
    _, path = file_of(tmp_path, dataclasses.replace(llama(), attention=windowed))
    again = store.load(path)
    assert again.config.attention == GROUPED
    assert again.config.family == "llama"


@pytest.mark.parametrize(("window", "computed"), [(0, True), (255, False), (256, True)])
def test_a_window_that_a_file_of_qwen_names_is_refused_where_it_would_matter(
    window: int, *, computed: bool, tmp_path: Path
) -> None:
    """Nothing in the file says whether the model uses it."""
    _, path = file_of(tmp_path, CASES["qwen2"])
    header = read_header(path)
    named = dataclasses.replace(header, keys={**header.keys, "qwen2.attention.sliding_window": window})
    if computed:
        assert model_of(named) == model_of(header)
    else:
        with pytest.raises(ConsiliumError, match="sliding_window 255, which is not computed here"):
            model_of(named)


def test_what_llama_cpp_does_without_a_window_is_said(tmp_path: Path) -> None:
    windowed = dataclasses.replace(llama(), attention=dataclasses.replace(GROUPED, window=9))
    store.save(trained(windowed), tmp_path / "model", tokenizer=Tokenizer.of_bytes())
    (notice,) = export(tmp_path / "model", tmp_path / "model.gguf").notices
    assert "in texts of more than 9 tokens it attends to all of them" in notice
    assert read_header(tmp_path / "model.gguf").keys["llama.attention.sliding_window"] == 9


def test_a_window_that_llama_cpp_has_no_key_for_is_refused(tmp_path: Path) -> None:
    windowed = dataclasses.replace(GROUPED, qkv_bias=True, window=9)
    store.save(trained(dense("qwen2", windowed)), tmp_path / "model")
    with pytest.raises(
        ConsiliumError, match=r"has no window in a qwen2 \(attention\.window\); convert it --to hf"
    ):
        export(tmp_path / "model", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
