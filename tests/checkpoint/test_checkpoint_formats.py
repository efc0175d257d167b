"""Formats of weights: float16 and small factors are read, packed ones are refused by their method's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from checkpoint.models import answer, llama, saved
from consilium.checkpoint import fp8, safetensors_io, store
from consilium.checkpoint.convert import convert
from consilium.errors import ConsiliumError
from consilium.model.build import build

METHODS: list[tuple[dict[str, Any], str]] = [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "gptq"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
    (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        "compressed",
    ),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
    ({"quantization_config": {"group_size": 64, "bits": 4}}, "MLX"),
    ({"quantization_config": {"quant_method": "torchao", "quant_type": "int4_weight_only"}}, "torchao"),
    ({"quantization_config": {"quant_method": "quanto"}}, "quanto"),
    ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
    ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "fbgemm_fp8"),
]


def folder_of(path: Path, tensors: dict[str, torch.Tensor], **keys: Any) -> Path:
    """A model without our key, whose projections are gone as in packed folders."""
    folder = saved(path, llama(), manifest=False)
    config = json.loads((folder / "config.json").read_text())
    del config["consilium"]
    (folder / "config.json").write_text(json.dumps(config | keys))
    kept = {n: t for n, t in safetensors_io.read(folder / "model.safetensors").items() if "_proj" not in n}
    safetensors.torch.save_file(kept | tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("keys", "name"), METHODS, ids=lambda value: str(value)[:60])
def test_packed_weights_are_refused_by_the_name_of_their_method(
    keys: dict[str, Any], name: str, tmp_path: Path
) -> None:
    with pytest.raises(ConsiliumError, match=name) as caught:
        store.load(folder_of(tmp_path / "m", {}, **keys))
    assert "missing" not in str(caught.value)


@pytest.mark.parametrize(
    ("ending", "name"),
    [
        ("q_proj.qweight", "GPTQ or AWQ"),
        ("q_proj.weight_packed", "compressed-tensors"),
        ("gate_up_proj_blocks", "MXFP4"),
        ("q_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("q_proj.biases", "MLX"),
        ("q_proj.W_q", "HQQ"),
    ],
)
def test_packed_weights_show_in_the_names_of_their_tensors(ending: str, name: str, tmp_path: Path) -> None:
    tensors = {f"model.layers.0.self_attn.{ending}": torch.zeros(2, dtype=torch.int32)}
    with pytest.raises(ConsiliumError, match=name):
        store.load(folder_of(tmp_path / "m", tensors))


@pytest.mark.parametrize(("file", "name"), [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")])
def test_packed_weights_show_in_the_file_beside_them(file: str, name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", {})
    (folder / file).write_text("{}")
    with pytest.raises(ConsiliumError, match=name):
        store.load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_of_eight_bits_have_any_float(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(5, 7).to(torch.float8_e4m3fn)
    factors = (torch.rand(3, 2) + 0.5).to(dtype)
    safetensors.torch.save_file({"w": values, "w_scale_inv": factors}, tmp_path / "f.safetensors")
    stored = fp8.pair(safetensors_io.read_header(tmp_path / "f.safetensors"), (2, 4))["w"]
    assert isinstance(stored, fp8.Scaled)
    target = torch.zeros(5, 7)
    fp8.read_into("w", stored, target)
    wide = factors.float().repeat_interleave(2, 0)[:5].repeat_interleave(4, 1)[:, :7]
    assert torch.equal(target, values.float() * wide)


def test_float16_stays_float16(tmp_path: Path) -> None:
    store.save(build(llama(), dtype="float16"), tmp_path / "a")
    assert store.load(tmp_path / "a").embed.weight.dtype == torch.float16
    convert(tmp_path / "a", tmp_path / "b")
    kinds = {tensor.dtype for tensor in safetensors_io.read(tmp_path / "b" / "model.safetensors").values()}
    assert kinds == {torch.float16}
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("differs", [False, True], ids=["repeats", "differs"])
def test_a_head_beside_a_tied_embedding_counts_where_it_differs(*, differs: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", llama(), manifest=False)
    plain = answer(store.load(folder))
    tensors = safetensors_io.read(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["consilium"]
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    if not differs:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    loaded = store.load(folder)
    assert loaded.config.tied is not differs
    assert torch.equal(answer(loaded), plain) is differs
