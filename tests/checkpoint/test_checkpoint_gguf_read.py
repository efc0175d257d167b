"""A GGUF file opens as a model: what was written comes back, and hostile files are one sentence."""

from __future__ import annotations

import dataclasses
import itertools
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.gguf_models import CASES, deepseek_v2, llama, mixtral, qwen3
from checkpoint.models import trained
from consilium.checkpoint import packed, store
from consilium.checkpoint.convert import convert
from consilium.checkpoint.gguf import source as reading
from consilium.checkpoint.gguf.export import export
from consilium.cli.models import read_model
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError
from consilium.model.decoder import Decoder
from consilium.ops.gguf import read_header
from consilium.ops.weights import Packing
from support import relative_error

TOKENS = torch.arange(1, 41).reshape(2, 20)
QUANTISED = [
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "TQ1_0",
    "TQ2_0",
    "MXFP4",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ1_S",
    "IQ1_M",
    "IQ4_NL",
    "IQ4_XS",
    "F16",
    "BF16",
    "F32",
]


def file_of(folder: Path, config: Model, dtype: str | None = None) -> tuple[Decoder, Path]:
    model = trained(config)
    store.save(model, folder / "model", tokenizer=Tokenizer.of_bytes())
    export(folder / "model", folder / "model.gguf", dtype=dtype)
    return model, folder / "model.gguf"


@torch.no_grad()
def logits(model: Decoder) -> torch.Tensor:
    return model.eval()(TOKENS).logits


@pytest.mark.parametrize("name", [name for name in CASES if name != "deepseek_v2-27"])
def test_what_was_written_comes_back(name: str, tmp_path: Path) -> None:
    model, path = file_of(tmp_path, CASES[name])
    again = store.load(path)
    assert relative_error(logits(again), logits(model)) < 1e-6
    if name != "deepseek_v3-halves":  # rows change places there: neighbours are rotated instead of halves
        kept = {key: value for key, value in model.state_dict().items() if not key.startswith("mtp.")}
        assert again.state_dict().keys() == kept.keys()
        assert all(torch.equal(value, kept[key]) for key, value in again.state_dict().items())
    assert again.config == read_model(str(path))


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe"])
def test_the_width_of_a_dense_network_that_no_layer_has_is_not_that_of_experts(
    name: str, tmp_path: Path
) -> None:
    model, path = file_of(tmp_path, dataclasses.replace(CASES[name], dense=FeedForward(width=160)))
    assert relative_error(logits(store.load(path)), logits(model)) < 1e-6


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "deepseek_v3"])
def test_a_file_becomes_a_folder_that_computes_the_same(name: str, tmp_path: Path) -> None:
    model, path = file_of(tmp_path, CASES[name])
    convert(path, tmp_path / "again")
    assert torch.equal(logits(store.load(tmp_path / "again")), logits(model))
    tokenizer = Tokenizer.load(tmp_path / "again")
    assert tokenizer.encode("déjà vu 12") == Tokenizer.of_bytes().encode("déjà vu 12")
    end = Tokenizer.of_bytes().eos_id
    assert (tokenizer.eos_id, tokenizer.opening_id) == (end, end)


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    """Nor is the destination blamed, where it is read to be written elsewhere."""
    _, path = file_of(tmp_path, CASES["llama"])
    opened = store.open_folder(path)
    path.unlink()
    with pytest.raises(ConsiliumError, match=r"model.gguf cannot be read \(no such file or directory\)"):
        opened.read("embed.weight")


def test_a_file_in_sixteen_bits_stays_so_and_another_is_float32(tmp_path: Path) -> None:
    _, path = file_of(tmp_path / "a", qwen3(), "bfloat16")
    assert store.load(path).embed.weight.dtype == torch.bfloat16
    _, path = file_of(tmp_path / "b", qwen3(), "q8_0")
    assert store.load(path).embed.weight.dtype == torch.float32
    assert store.load(path, dtype="bfloat16").embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", QUANTISED)
def test_every_type_is_read_in_pieces_as_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of random bytes with small factors: the pieces of a read meet where the blocks do."""
    kind = gguf.GGMLQuantizationType[name]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    rows, blocks = 7, 64 if values == 1 else 2
    if values == 1:
        plain = np.random.default_rng(0).standard_normal((rows, blocks), dtype=np.float32)
        stored = gguf.quantize(plain, kind).view(np.uint8).reshape(rows, -1)
    else:
        stored = np.random.default_rng(0).integers(0, 60, (rows, blocks * size), dtype=np.uint8)
    path = tmp_path / "t.bin"
    path.write_bytes(b"xyz" + stored.tobytes())
    monkeypatch.setattr(reading, "_PIECE", 2 * values * blocks)
    target = torch.empty(rows, values * blocks)
    entry = gguf_entry(path, kind, tuple(target.shape))
    reading._read_into(entry, target, check_finite=False)
    wanted = torch.from_numpy(dequantize(stored, kind).copy())
    assert torch.equal(target.nan_to_num(), wanted.nan_to_num())


def gguf_entry(path: Path, kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> reading.Entry:
    return reading.Entry(path, "x", kind, shape, 3)


def parts_of(path: Path, folder: Path, count: int) -> list[Path]:
    """``path`` as ``count`` files, as llama.cpp splits them."""
    reader = gguf.GGUFReader(path)
    folder.mkdir()
    names = [folder / f"m-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    for number, name in enumerate(names):
        writer = gguf.GGUFWriter(name, "llama")
        if number == 0:
            for field in reader.fields.values():
                if field.name.startswith(("llama.", "tokenizer.")):
                    sub = field.types[-1] if len(field.types) > 1 else None
                    writer.add_key_value(field.name, field.contents(), field.types[0], sub)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return names


def test_the_parts_of_a_split_file_are_one_model(tmp_path: Path) -> None:
    model, path = file_of(tmp_path, llama())
    first, second, third = parts_of(path, tmp_path / "split", 3)
    for part in (first, third):
        assert torch.equal(logits(store.load(part)), logits(model))
    second.rename(tmp_path / "elsewhere")
    with pytest.raises(ConsiliumError, match=r"one of 3 parts, and m-00002-of-00003\.gguf is missing"):
        store.load(first)
    first.rename(tmp_path / "split" / "model.gguf")
    with pytest.raises(ConsiliumError, match="names that they were published with"):
        store.load(tmp_path / "split" / "model.gguf")


Tensors = Iterator[tuple[str, np.ndarray, gguf.GGMLQuantizationType]]


def renamed(path: Path, arch: str, tensors: Callable[[gguf.ReaderTensor], Tensors], more: Tensors) -> Path:
    """The file with others in the place of each tensor, ``more`` of them, and its keys of ``arch``."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_name("old.gguf"), arch)
    for field in reader.fields.values():
        if field.name.startswith(f"{arch}."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for name, values, kind in (*itertools.chain.from_iterable(map(tensors, reader.tensors)), *more):
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("old.gguf")


def test_older_files_hold_the_matrix_of_keys_and_values_whole(tmp_path: Path) -> None:
    model, path = file_of(tmp_path, deepseek_v2())

    def kept(tensor: gguf.ReaderTensor) -> Tensors:
        if "_b." not in tensor.name or "attn_q_b" in tensor.name:
            yield tensor.name, tensor.data, tensor.tensor_type

    def whole() -> Tensors:
        for i in range(model.config.layers):
            kv_up = model.state_dict()[f"layers.{i}.attention.kv_up.weight"].numpy()
            yield f"blk.{i}.attn_kv_b.weight", kv_up, gguf.GGMLQuantizationType.F32

    old = renamed(path, "deepseek2", kept, whole())
    assert torch.equal(logits(store.load(old)), logits(model))


def apart(tensor: gguf.ReaderTensor) -> Tensors:
    """A tensor for each expert of a stack, as in files of before March 2024."""
    if not tensor.name.endswith("_exps.weight"):
        yield tensor.name, tensor.data, tensor.tensor_type
        return
    for expert, values in enumerate(tensor.data):
        name = tensor.name.replace("_exps", f".{expert}")
        yield name, np.ascontiguousarray(values), tensor.tensor_type


@pytest.mark.parametrize("part", [packed.PART_BYTES, 1], ids=["whole", "an expert at a time"])
@pytest.mark.parametrize("packing", [None, "int8", "int4"])
def test_older_files_hold_each_expert_apart(
    packing: Packing | None, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken as they lie in 8 bits, packed anew in 4."""
    _, path = file_of(tmp_path, mixtral(), "q8_0")
    old = renamed(path, "llama", apart, iter(()))
    monkeypatch.setattr(packed, "PART_BYTES", part)
    right = store.load(path, weights=packing).state_dict()
    found = store.load(old, weights=packing).state_dict()
    assert all(torch.equal(found[name], values) for name, values in right.items())


def test_what_a_file_lacks_is_named(tmp_path: Path) -> None:
    _, path = file_of(tmp_path, mixtral())

    def kept(tensor: gguf.ReaderTensor) -> Tensors:
        if tensor.name != "blk.1.ffn_down.2.weight":
            yield tensor.name, tensor.data, tensor.tensor_type

    old = renamed(
        renamed(path, "llama", apart, iter(())).rename(tmp_path / "a.gguf"), "llama", kept, iter(())
    )
    with pytest.raises(ConsiliumError, match=r"its own keys: 1 missing \(blk\.1\.ffn_down\.2\.weight\)"):
        store.load(old)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("broken")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("small")
    config = dataclasses.replace(llama(), layers=1)
    return file_of(folder, config, "q8_0")[1].read_bytes()


def opened(path: Path) -> None:
    """Everything that any verb does with a file."""
    store.load(path, check_finite=True)
    Tokenizer.load(path)


def complaint(path: Path) -> str:
    """What opening says, nothing where it succeeds. Any other error fails the test."""
    try:
        opened(path)
    except ConsiliumError as error:
        return str(error)
    return ""


@settings(max_examples=150, deadline=2000)
@given(data=st.data())
def test_a_damaged_file_is_one_sentence_or_a_model(data: st.DataObject, small: bytes, folder: Path) -> None:
    header = small.find(b"output_norm.weight") + 400
    place = data.draw(st.integers(0, header) | st.integers(0, len(small) - 1))
    broken = bytearray(small)
    match data.draw(st.sampled_from(["cut", "byte", "word", "long"])):
        case "cut":
            del broken[place:]
        case "byte":
            broken[place] = data.draw(st.integers(0, 255))
        case "word":
            broken[place : place + 4] = data.draw(st.binary(min_size=4, max_size=4))
        case _:
            broken[place : place + 8] = struct.pack("<Q", data.draw(st.integers(2**20, 2**64 - 1)))
    path = folder / "broken.gguf"
    path.write_bytes(broken)
    said = complaint(path)
    assert "\n" not in said
    assert not said or str(path) in said or "token" in said


HEAD = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04" + bytes(60), "is not a GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "is of version 1 of the format"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "announces 1,099,511,627,776 tensors"),
        (HEAD + struct.pack("<Q", 2**62), "has a name of"),
        (HEAD + struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**60), "ends inside a list of"),
        (HEAD + struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 2**60), "ends inside its header"),
        (HEAD + struct.pack("<Q1sIIQ", 1, b"a", 9, 9, 1), "has a list of lists"),
        (HEAD + struct.pack("<Q1sI", 1, b"a", 77), "kind 77, which the format does not know"),
        (HEAD[:16] + struct.pack("<Q", 2) + struct.pack("<Q1sIB", 1, b"a", 0, 1) * 2, "names 'a' twice"),
    ],
)
def test_hostile_headers_are_refused_at_once(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(ConsiliumError, match=message):
        read_header(path)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not read from GGUF here"),
        ({"general.type": "adapter"}, "holds a adapter, not a model"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope'"),
        ({"llama.rope.scaling.factor": 4}, "rope.scaling.type 'linear' of factor 4"),
        ({"llama.rope.scale_linear": 4}, "rope.scaling.type 'linear' of factor 4"),
        ({"llama.rope.scaling.attn_factor": 2}, "rope.scaling.attn_factor 2"),
        ({"llama.rope.scaling.yarn_ext_factor": 2}, "rope.scaling.yarn_ext_factor 2"),
        ({"llama.attention.causal": 0}, "attention to later tokens"),
        ({"llama.attention.temperature_length": 64}, "attention.temperature_length 64"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count 8 beside keys of 16"),
        (
            {"llama.attention.sliding_window": 128, "llama.attention.sliding_window_pattern": 2},
            "layers that differ in their window",
        ),
        ({"llama.attention.sliding_window": "wide"}, "sliding_window is 'wide' and must be"),
        ({"llama.block_count": 10**6}, "asks for|no model has more"),
        ({"tokenizer.ggml.pre": "viking"}, "the rule 'viking', which is not read here"),
        ({"tokenizer.ggml.model": "t5"}, "of the kind 't5'"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "names token 1000000 as eos"),
    ],
)
def test_what_is_not_computed_here_is_refused_by_its_name(
    keys: dict[str, object], message: str, small: bytes, tmp_path: Path
) -> None:
    (tmp_path / "a.gguf").write_bytes(small)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    arch = str(keys.get("general.architecture", "llama"))
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", arch)
    for field in reader.fields.values():
        if field.name.startswith(("llama.", "tokenizer.")) and field.name not in keys:
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for key, value in keys.items():
        if key != "general.architecture":
            writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(
                key, int(str(value))
            )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConsiliumError, match=message):
        opened(tmp_path / "b.gguf")


def test_a_file_that_is_not_there_and_one_without_a_tokenizer_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="no such file"):
        store.load(tmp_path / "x.gguf")
    store.save(trained(llama()), tmp_path / "model")
    export(tmp_path / "model", tmp_path / "bare.gguf")
    store.load(tmp_path / "bare.gguf")
    with pytest.raises(ConsiliumError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path / "bare.gguf")
