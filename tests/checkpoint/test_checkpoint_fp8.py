"""Weights in 8 bits with a factor a block are read as their product, whatever the sizes, or refused by name.

Legend: R rows, C columns of a matrix.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from checkpoint.models import deepseek_v3, trained
from consilium.checkpoint import fp8, safetensors_io, store
from consilium.checkpoint.hf.naming import TABLES, named
from consilium.errors import ConsiliumError
from consilium.model.packing import packings
from consilium.ops.weights import packed, unpacked

FP8 = torch.float8_e4m3fn
BLOCK = (4, 6)
KINDS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}


def quantised(tensor: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """As DeepSeek does it: the largest value of a block becomes 448, the largest that e4m3 has."""
    high, wide = block
    rows, columns = tensor.shape
    scales = torch.zeros(math.ceil(rows / high), math.ceil(columns / wide))
    values = torch.zeros(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
            scales[i, j] = max(float(tensor[here].abs().max()), 1e-12) / 448
            values[here] = tensor[here] / scales[i, j]
    return values.to(FP8), scales


def naive(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    result = torch.zeros(values.shape)
    flat, factors = values.float().reshape(-1, *values.shape[-2:]), scales.reshape(-1, *scales.shape[-2:])
    for m in range(flat.shape[0]):
        for r in range(flat.shape[1]):
            for c in range(flat.shape[2]):
                factor = factors[m, r // block[0], c // block[1]]
                result.view(flat.shape)[m, r, c] = flat[m, r, c] * factor
    return result


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 14), st.integers(1, 14)),
    block=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    stacked=st.booleans(),
    target=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
def test_a_matrix_is_its_values_times_the_factors_of_their_blocks(
    sizes: tuple[int, int, int],
    block: tuple[int, int],
    stacked: bool,
    target: torch.dtype,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    shape = sizes if stacked else sizes[1:]
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator) * 100).to(FP8)
    grid = (*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1]))
    scales = torch.rand(grid, generator=generator) + 0.01
    path = tmp_path_factory.mktemp("fp8") / "file"
    safetensors_io.write(path, {"w": values, "w_scale_inv": scales})
    stored = fp8.pair(safetensors_io.read_header(path), block)
    assert list(stored) == ["w"]
    assert isinstance(stored["w"], fp8.Scaled)
    result = torch.full(shape, math.nan, dtype=target)
    fp8.read_into("w", stored["w"], result)
    assert torch.equal(result, naive(values, scales, block).to(target))


def written(folder: Path, tensors: Mapping[str, Tensor], quantization: object) -> Path:
    """A folder as published: no key of ours in config.json and no manifest."""
    config = store.to_hugging_face(deepseek_v3(depth=1), dtype="bfloat16")
    del config["consilium"]
    folder.mkdir()
    extra = {} if quantization is None else {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config | extra))
    safetensors_io.write(folder / "model.safetensors", tensors)
    return folder


def published(block: tuple[int, int] = BLOCK) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a small DeepSeek-V3 as in its FP8 files, and what they must be read as."""
    model = trained(deepseek_v3(depth=1), dtype="bfloat16")
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, tensor in named(model.config, model.state_dict(), TABLES["deepseek_v3"][0]):
        tensors[name] = expected[name] = tensor
        if "_proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantised(tensor.float(), block)
            expected[name] = naive(tensors[name], tensors[f"{name}_scale_inv"], block)
    return tensors, expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_published_folder_is_dequantised_on_load(dtype: str, tmp_path: Path) -> None:
    tensors, expected = published()
    folder = written(tmp_path / "model", tensors, {**KINDS, "weight_block_size": list(BLOCK)})
    model = store.load(folder, dtype=dtype, check_finite=True)
    assert str(model.embed.weight.dtype) == f"torch.{dtype}"
    assert sum(tensor.dtype == FP8 for tensor in tensors.values()) > 60
    for name, tensor in named(model.config, model.state_dict(), TABLES["deepseek_v3"][0]):
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


@pytest.mark.parametrize("quantization", [None, KINDS])
def test_blocks_are_128_by_128_unless_the_folder_says_otherwise(
    quantization: dict[str, str] | None, tmp_path: Path
) -> None:
    tensors, expected = published((128, 128))
    model = store.load(written(tmp_path / "model", tensors, quantization), dtype="float32")
    for name, tensor in named(model.config, model.state_dict(), TABLES["deepseek_v3"][0]):
        assert torch.equal(tensor, expected[name].float()), name


NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}_scale_inv"), "is in 8 bits without its factors"),
        (lambda t: t.pop(NAME), "scales a tensor in 8 bits and .* is not there"),
        (lambda t: t.update({NAME: t[NAME].bfloat16()}), "scales a tensor in 8 bits and .* is not one"),
        (lambda t: t.update({f"{NAME}_scale_inv": t[f"{NAME}_scale_inv"].T.contiguous()}), "needs float32"),
        (lambda t: t.update({f"{NAME}_scale_inv": t[f"{NAME}_scale_inv"].double()}), "needs float32"),
        (lambda t: t.update({f"{NAME}_scale_inv": torch.ones(())}), "needs float32"),
        (lambda t: t.update({NAME: t[NAME].flatten()}), "needs float32"),
        (lambda t: t.update({NAME: t[NAME][:-1].contiguous()}), "needs float32|of another shape"),
    ],
    ids=["no scale", "no weight", "not fp8", "transposed", "float64", "scalar", "flat", "short"],
)
def test_a_weight_without_its_factors_is_refused_by_name(
    change: object, message: str, tmp_path: Path
) -> None:
    assert callable(change)
    tensors, _ = published((4, 5))
    change(tensors)
    folder = written(tmp_path / "model", tensors, {**KINDS, "weight_block_size": [4, 5]})
    with pytest.raises(ConsiliumError, match=message) as caught:
        store.load(folder)
    assert NAME in str(caught.value)


@pytest.mark.parametrize("where", ["value", "factor"])
def test_a_value_that_is_no_number_is_named_when_asked(where: str, tmp_path: Path) -> None:
    tensors, _ = published()
    if where == "value":
        tensors[NAME].view(torch.uint8)[2, 3] = 0x7F
    else:
        tensors[f"{NAME}_scale_inv"][0, 1] = math.inf
    folder = written(tmp_path / "model", tensors, {**KINDS, "weight_block_size": list(BLOCK)})
    store.load(folder)
    with pytest.raises(ConsiliumError, match=f"tensor {NAME.replace('.', '[.]')}.* holds NaN or infinity"):
        store.load(folder, check_finite=True)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'"),
        ({**KINDS, "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({**KINDS, "activation_scheme": "static"}, "activation_scheme 'static'"),
        ({**KINDS, "weight_block_size": None}, "weight_block_size 'None'"),
        ({**KINDS, "weight_block_size": [128]}, "weight_block_size '[128]'"),
        ({**KINDS, "weight_block_size": [128, 0]}, "weight_block_size '[128, 0]'"),
        ("fp8", "quantization_config 'fp8'"),
        ({}, "quant_method 'None'"),
    ],
)
def test_another_kind_of_quantisation_is_refused_by_its_name(
    quantization: object, named: str, tmp_path: Path
) -> None:
    tensors, _ = published()
    with pytest.raises(ConsiliumError, match=r"config\.json: quantization_config") as caught:
        store.load(written(tmp_path / "model", tensors, quantization))
    assert named in str(caught.value)


def packed_as_read(folder: Path) -> Mapping[str, Tensor]:
    return store.load(folder, weights="fp8", dtype="float32", check_finite=True).state_dict()


@pytest.mark.parametrize("high", [128, 4])
def test_blocks_are_taken_as_they_lie(high: int, tmp_path: Path) -> None:
    """Every value that they stand for, which packing anew would not keep; others are packed from theirs."""
    tensors, _ = published((high, 128))
    folder = written(tmp_path / "model", tensors, {**KINDS, "weight_block_size": [high, 128]})
    wide, found = store.load(folder, dtype="float32"), packed_as_read(folder)
    names = packings(wide, "fp8")
    codes = {name for name in found if found[name].dtype == FP8}
    assert codes == set(names)
    for name in names:
        weight = wide.get_parameter(name)
        values = unpacked(found[name], found[f"{name}_scales"], weight.shape[-1])
        if "head" in name or "eh_proj" in name:
            continue
        assert torch.equal(values, weight), name


def test_blocks_of_another_width_are_packed_anew(tmp_path: Path) -> None:
    tensors, _ = published()
    folder = written(tmp_path / "model", tensors, {**KINDS, "weight_block_size": list(BLOCK)})
    wide, found = store.load(folder, dtype="float32"), packed_as_read(folder)
    for name in packings(wide, "fp8"):
        codes, scales = packed(wide.get_parameter(name).detach(), "fp8")
        assert torch.equal(found[name].float(), codes.float()), name
        assert torch.equal(found[f"{name}_scales"], scales), name


def test_blocks_with_what_is_no_number_are_refused(tmp_path: Path) -> None:
    tensors, _ = published((128, 128))
    tensors[NAME].view(torch.uint8)[3, 5] = 255
    folder = written(tmp_path / "model", tensors, KINDS)
    with pytest.raises(ConsiliumError, match=r"layers\.1\.moe\.experts\.up holds NaN, which packed"):
        packed_as_read(folder)
