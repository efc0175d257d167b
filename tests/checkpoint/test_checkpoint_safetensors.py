"""Our safetensors files are everybody's: the reference library reads them, and we read what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.checkpoint import safetensors_io, weights
from consilium.errors import ConsiliumError

SHAPES = st.lists(st.integers(0, 5), max_size=3)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


def some(shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


TENSORS = st.dictionaries(
    NAMES, st.builds(some, SHAPES, st.sampled_from(list(safetensors_io.DTYPES.values()))), max_size=5
)


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor)
        for name, tensor in expected.items()
    )


@given(tensors=TENSORS)
def test_the_reference_library_reads_what_we_write_and_the_reverse(
    tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("files")
    safetensors_io.write(folder / "ours", tensors)
    assert same(safetensors.torch.load((folder / "ours").read_bytes()), tensors)
    (folder / "theirs").write_bytes(safetensors.torch.save(tensors))
    assert same(safetensors_io.read(folder / "theirs"), tensors)
    assert same(safetensors_io.read(folder / "ours"), tensors)


@pytest.mark.parametrize("view", [lambda x: x.T, lambda x: x[:, 1], lambda x: x[::2], lambda x: x[2:]])
def test_views_are_written_as_what_they_show(view: object, tmp_path: Path) -> None:
    assert callable(view)
    whole = torch.arange(20.0).reshape(4, 5)
    safetensors_io.write(tmp_path / "file", {"view": view(whole), "whole": whole})
    assert same(safetensors_io.read(tmp_path / "file"), {"view": view(whole), "whole": whole})


@pytest.mark.parametrize("values", [1, 2**18 - 1, 2**18, 2**18 + 1, 2 * 2**18 + 3])
def test_tensors_longer_than_a_piece_are_read_whole(values: int, tmp_path: Path) -> None:
    tensor = torch.arange(values, dtype=torch.float32)
    safetensors_io.write(tmp_path / "file", {"first": tensor[:7], "long": tensor})
    assert torch.equal(safetensors_io.read(tmp_path / "file")["long"], tensor)


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8), most=st.integers(1, 200))
def test_shards_keep_their_limit_and_together_hold_everything(
    sizes: list[int], most: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": torch.full((size,), float(i)) for i, size in enumerate(sizes)}
    safetensors_io.write_sharded(folder, tensors, shard_bytes=most)
    files = weights.weight_files(folder)
    for path in files:
        held = safetensors_io.read(path)
        assert (
            sum(4 * tensor.numel() for tensor in held.values()) <= most
            or len([tensor for tensor in held.values() if tensor.numel()]) == 1
        )
    assert weights.find(folder).keys() == tensors.keys()
    if len(files) > 1:
        index = json.loads((folder / weights.INDEX).read_text())
        assert index["metadata"]["total_size"] == 4 * sum(sizes)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_floating_values_are_converted_into_the_target(kind: torch.dtype, tmp_path: Path) -> None:
    source = torch.randn(9).to(kind)
    safetensors_io.write(tmp_path / "file", {"x": source})
    target = torch.zeros(9)
    safetensors_io.read_into("x", safetensors_io.read_header(tmp_path / "file")["x"], target)
    assert torch.equal(target, source.float())


@pytest.mark.parametrize(("kind", "into"), [(torch.int64, torch.float32), (torch.int32, torch.int64)])
def test_whole_numbers_are_never_converted(kind: torch.dtype, into: torch.dtype, tmp_path: Path) -> None:
    safetensors_io.write(tmp_path / "file", {"x": torch.ones(3, dtype=kind)})
    entry = safetensors_io.read_header(tmp_path / "file")["x"]
    with pytest.raises(ConsiliumError, match=r"has x as I(64|32) where (F32|I64) is needed"):
        safetensors_io.read_into("x", entry, torch.zeros(3, dtype=into))


def test_a_folder_without_weights_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConsiliumError, match=r"pickled .* are never opened"):
        weights.find(tmp_path)


def test_a_file_cut_while_it_is_read_is_named_with_its_tensor(tmp_path: Path) -> None:
    safetensors_io.write(tmp_path / "file", {"x": torch.ones(300)})
    entry = safetensors_io.read_header(tmp_path / "file")["x"]
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-1])
    with pytest.raises(ConsiliumError, match="ends inside tensor x"):
        safetensors_io.read_into("x", entry, torch.zeros(300))
