"""A converted folder is the same model: values, configuration, tokens and tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoint.models import ALL, answer, deepseek_v3, llama, mixtral, saved, trained
from consilium.checkpoint import safetensors_io, store
from consilium.checkpoint.convert import convert
from consilium.data.tokenizer import Tokenizer
from consilium.disk.files import DISK, Chunk
from consilium.errors import ConsiliumError


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(actual) == list(expected) and all(
        actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor)
        for name, tensor in expected.items()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
def test_a_converted_model_is_the_one_that_loads_in_that_dtype(name: str, dtype: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", ALL[name])
    convert(folder, tmp_path / "other", dtype=dtype)
    converted = store.load(tmp_path / "other")
    assert converted.config == ALL[name]
    assert same(converted.state_dict(), store.load(folder, dtype=dtype).state_dict())


def test_there_and_back_is_the_model_again(tmp_path: Path) -> None:
    store.save(trained(deepseek_v3(depth=1), dtype="bfloat16"), tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "wide", dtype="float32")
    convert(tmp_path / "wide", tmp_path / "back", dtype="bfloat16")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def fused(folder: Path) -> Path:
    """Rewrite the experts of ``folder`` as transformers holds them in memory."""
    file = folder / "model.safetensors"
    tensors = safetensors_io.read(file)
    model = store.load(folder)
    for i in range(model.config.layers):
        layer, prefix = f"layers.{i}.moe", f"model.layers.{i}."
        for name in [n for n in tensors if n.startswith(f"{prefix}block_sparse_moe")]:
            del tensors[name]
        tensors[f"{prefix}mlp.gate.weight"] = model.state_dict()[f"{layer}.router.projection.weight"]
        tensors[f"{prefix}mlp.experts.gate_up_proj"] = model.state_dict()[f"{layer}.experts.up"]
        tensors[f"{prefix}mlp.experts.down_proj"] = model.state_dict()[f"{layer}.experts.down"]
    file.unlink()
    safetensors_io.write(file, tensors)
    return folder


@settings(max_examples=8)
@given(most=st.integers(2000, 30_000))
def test_fused_experts_come_out_in_the_published_layout_whatever_the_shards(
    most: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fused")
    whole = saved(folder / "whole", mixtral(), manifest=False)
    expected = safetensors_io.read(whole / "model.safetensors")
    tensors = safetensors_io.read(fused(whole) / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors
    (whole / "model.safetensors").unlink()
    safetensors_io.write_sharded(whole, tensors, shard_bytes=most)
    convert(whole, folder / "out")
    assert same(safetensors_io.read(folder / "out" / "model.safetensors"), expected)


def foreign(folder: Path) -> Path:
    """As downloaded: tokens of its own, a tokenizer that only transformers 5 opens, and code."""
    saved(folder, llama(), manifest=False)
    config = json.loads((folder / "config.json").read_text())
    del config["consilium"]
    tokens = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
    (folder / "config.json").write_text(
        json.dumps(config | tokens | {"auto_map": {"AutoConfig": "evil.Evil"}})
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.6}')
    Tokenizer.of_bytes().save(folder)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described |= {"tokenizer_class": "TokenizersBackend", "auto_map": {"AutoTokenizer": "evil.Evil"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "notes.txt").write_text("not ours")
    return folder


def test_tokens_and_tokenizer_go_along_and_code_does_not(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "model")
    convert(folder, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, [2, 3], 0)
    assert "auto_map" not in config
    described = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in described
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 3], "temperature": 0.6}
    assert torch.equal(answer(store.load(tmp_path / "out")), answer(store.load(folder)))


def test_progress_rises_to_all_bytes(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    folder = saved(tmp_path / "model", mixtral())
    convert(folder, tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    size = sum(tensor.nbytes for tensor in store.load(folder).state_dict().values())
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (size, size)


def test_the_folder_itself_is_no_destination(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llama())
    with pytest.raises(ConsiliumError, match="is the folder to convert"):
        convert(folder, tmp_path / "model" / ".." / "model")
    store.load(folder)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llama())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConsiliumError, match=r"holds files that no save wrote \(thesis\.txt\)"):
        convert(folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_value_that_is_no_number_stops_the_conversion_and_leaves_nothing(tmp_path: Path) -> None:
    model = trained(llama())
    with torch.no_grad():
        model.norm.weight[3] = math.inf
    store.save(model, tmp_path / "model")
    with pytest.raises(ConsiliumError, match=r"tensor model\.norm\.weight holds NaN or infinity"):
        convert(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class FullDisk:
    """The real disk until weights are written."""

    def __init__(self) -> None:
        for name in ("make_folder", "sync_file", "sync_folder", "rename", "unlink", "remove_folder"):
            setattr(self, name, getattr(DISK, name))

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        if path.suffix == ".safetensors":
            raise OSError(28, "No space left on device")
        DISK.write(path, chunks)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llama())
    with pytest.raises(ConsiliumError, match="no space left on the disk"):
        convert(folder, tmp_path / "out", files=FullDisk())  # pyright: ignore[reportArgumentType]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
