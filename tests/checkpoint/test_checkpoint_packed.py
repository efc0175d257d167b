"""Packed weights in files: what is saved comes back bit for bit, and GGUF's are taken as they lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from torch import Tensor

from checkpoint.gguf_models import CASES
from checkpoint.models import trained
from consilium.checkpoint import packed, safetensors_io, store
from consilium.checkpoint.convert import convert, pack
from consilium.checkpoint.gguf import source as reading
from consilium.checkpoint.gguf.export import export
from consilium.checkpoint.verify import verify_folder
from consilium.config.model import Model
from consilium.data.tokenizer import Tokenizer
from consilium.disk import manifest
from consilium.engine.engine import Engine
from consilium.errors import ConsiliumError
from consilium.model.packing import pack as pack_all
from consilium.model.packing import packings
from consilium.ops.gguf import Entry, read_header
from consilium.ops.weights import PACKINGS, Packing, range_of, room, unpacked
from consilium.ops.weights import packed as pack_values
from small import DEEPSEEK, KINDS, SWITCH, lively
from support import relative_error

TYPES: Mapping[Packing, str] = {"int8": "q8_0", "int4": "q4_0", "uint4": "q4_1"}


def saved(folder: Path, config: Model = DEEPSEEK, packing: Packing = "int8") -> Path:
    """A packed folder, and beside it the one that it was made from."""
    store.save(lively(config), folder / "wide", tokenizer=Tokenizer.of_bytes())
    pack(folder / "wide", folder / "packed", packing)
    return folder / "packed"


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_saved_model_comes_back_bit_for_bit(config: Model, packing: Packing, tmp_path: Path) -> None:
    folder = saved(tmp_path, config, packing)
    right = store.load(tmp_path / "wide", weights=packing)
    store.save(right, tmp_path / "again")
    for place in (folder, tmp_path / "again"):
        found = store.load(place)
        assert found.config == right.config
        assert found.state_dict().keys() == right.state_dict().keys()
        for name, values in right.state_dict().items():
            assert found.state_dict()[name].dtype == values.dtype, name
            assert torch.equal(found.state_dict()[name].view(torch.uint8), values.view(torch.uint8)), name
    assert Tokenizer.load(folder).files() == Tokenizer.of_bytes().files()
    assert verify_folder(folder).faults == ()
    prompts = [[5, 6, 7], [8]]
    assert Engine(store.load(folder)).complete(prompts) == Engine(right).complete(prompts)


def test_a_packed_folder_is_smaller_and_says_what_it_holds(tmp_path: Path) -> None:
    folder = saved(tmp_path, packing="int4")
    found = json.loads((folder / "config.json").read_text())
    assert found["quantization_config"] == {"quant_method": "consilium", "weights": "int4"}
    assert (found["model_type"], found["dtype"]) == ("consilium", "bfloat16")
    sizes = [(place / "model.safetensors").stat().st_size for place in (folder, tmp_path / "wide")]
    assert sizes[0] < 0.4 * sizes[1], "of float32, with gates and an embedding that stay"


@pytest.mark.parametrize(
    "use",
    [
        convert,
        lambda folder, out: pack(folder, out, "int4"),
        export,
        lambda folder, out: store.load_weights(lively(DEEPSEEK), folder),
        lambda folder, out: store.open_folder(folder).read("head.weight"),
    ],
    ids=["convert", "pack", "export", "train", "upcycle"],
)
def test_who_computes_with_values_is_told_to_take_those_they_were_packed_from(
    use: Callable[[Path, Path], object], tmp_path: Path
) -> None:
    folder = saved(tmp_path)
    with pytest.raises(ConsiliumError, match=r"packed into int8, which are for generating .* packed from\."):
        use(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_bits_than_those_it_holds_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    assert store.load(folder, weights="int8").state_dict().keys() == store.load(folder).state_dict().keys()
    with pytest.raises(ConsiliumError, match="holds weights packed into int8; leave --weights int4 out"):
        store.load(folder, weights="int4")


def edited(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The same folder with other tensors, as somebody else would write it: without our manifest."""
    tensors = dict(safetensors_io.read(folder / "model.safetensors"))
    change(tensors)
    for name in ("model.safetensors", manifest.NAME):
        (folder / name).unlink()
    safetensors_io.write(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors["head.weight"][0].fill_(-128), "head.weight holds -128"),
        (lambda tensors: tensors["head.weight_scales"][0].fill_(torch.nan), "head.weight_scales holds NaN"),
        (lambda tensors: tensors.pop("head.weight_scales"), "head.weight_scales"),
        (lambda tensors: tensors.update(extra_scales=torch.zeros(3).half()), "extra_scales"),
        (lambda tensors: tensors.update({"head.weight": tensors["head.weight"].float()}), "head.weight"),
    ],
    ids=["-128", "nan", "missing", "extra", "float"],
)
def test_damaged_tensors_are_named(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    folder = edited(saved(tmp_path), change)
    with pytest.raises(ConsiliumError, match=message):
        store.load(folder, check_finite=True)


def test_a_kind_of_later_versions_is_named(tmp_path: Path) -> None:
    folder = edited(saved(tmp_path), lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weights"] = "int3"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConsiliumError, match="packed into 'int3' are not known here, only int8, int4, uint4, fp8"
    ):
        store.load(folder)


@pytest.mark.parametrize("packing", TYPES)
@pytest.mark.parametrize("name", [name for name in CASES if name != "deepseek_v2-27"])
def test_the_integers_of_a_gguf_file_are_taken_as_they_are(
    name: str, packing: Packing, tmp_path: Path
) -> None:
    """Dequantised they are the file's values exactly, which values rounded on the way would not be."""
    store.save(trained(CASES[name]), tmp_path / "model")
    export(tmp_path / "model", tmp_path / "model.gguf", dtype=TYPES[packing])
    wide = store.load(tmp_path / "model.gguf", dtype="float32").state_dict()
    found = store.load(tmp_path / "model.gguf", weights=packing)
    taken = 0
    for weight, kind in packings(found, packing).items():
        state = found.state_dict()
        values = unpacked(state[weight], state[f"{weight}_scales"], wide[weight].shape[-1])
        if kind == packing and wide[weight].shape[-1] % 32 == 0:
            assert torch.equal(values, wide[weight]), weight
            taken += 1
    assert taken or not any(wide[weight].shape[-1] % 32 == 0 for weight in packings(found, packing))


@pytest.mark.parametrize("packing", PACKINGS)
def test_values_of_other_types_are_packed_anew(packing: Packing, tmp_path: Path) -> None:
    config = next(config for config in CASES.values() if config.hidden_size % 32 == 0)
    store.save(trained(config), tmp_path / "model")
    export(tmp_path / "model", tmp_path / "model.gguf", dtype="bfloat16")
    convert(tmp_path / "model.gguf", tmp_path / "again")
    found, right = (
        store.load(tmp_path / place, weights=packing).state_dict() for place in ("model.gguf", "again")
    )
    for name, values in right.items():
        assert torch.equal(found[name], values), name


def block_file(path: Path, kind: gguf.GGMLQuantizationType, values: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("piece", [64, 1000, 2**22])
def test_blocks_are_read_in_pieces_as_at_once(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_PIECE", piece)
    values = np.random.default_rng(0).standard_normal((7, 3, 96), dtype=np.float32)
    for packing, type_ in TYPES.items():
        kind = gguf.GGMLQuantizationType[type_.upper()]
        entry = read_header(block_file(tmp_path / f"{kind.name}.gguf", kind, values)).tensors["x"]
        integers, scales = room(torch.empty(7, 3, 96), packing)
        scales.fill_(torch.nan)
        reading._read_packed(entry, integers, scales, check_finite=True)
        right = dequantize(gguf.quants.quantize(values, kind), kind)
        assert np.array_equal(unpacked(integers, scales, 96).numpy(), right)


def test_blocks_of_256_are_their_groups_with_scales_in_float16(tmp_path: Path) -> None:
    """Within what that rounds: half of the last of 11 bits of a scale and of a lowest value."""
    kind = gguf.GGMLQuantizationType.Q4_K
    stored = np.random.default_rng(0).integers(0, 256, (6, 3, 144), dtype=np.uint8)
    stored[..., :4] = np.random.default_rng(1).uniform(0.1, 2, (6, 3, 2)).astype(np.float16).view(np.uint8)
    (tmp_path / "t.bin").write_bytes(stored.tobytes())
    integers, scales = room(torch.empty(6, 768), "uint4")
    reading._read_packed(
        Entry(tmp_path / "t.bin", "x", kind, (6, 768), 0), integers, scales, check_finite=True
    )
    right = torch.from_numpy(dequantize(stored.reshape(6, -1), kind))
    error = (unpacked(integers, scales, 768) - right).abs().unflatten(1, (-1, 32))
    scale, lowest = scales.float().abs()[..., None].chunk(2, 1)
    assert (error <= 2.0**-11 * (15 * scale + lowest)).all()
    assert error.amax() > 0


@pytest.mark.parametrize("first", [0, 2, 5])
def test_some_experts_of_a_file_are_read_alone(first: int, tmp_path: Path) -> None:
    values = np.arange(7 * 3 * 32, dtype=np.float32).reshape(7, 3, 32)
    kind = gguf.GGMLQuantizationType.F32
    entry = read_header(block_file(tmp_path / "x.gguf", kind, values)).tensors["x"]
    target = torch.full((2, 3, 32), torch.nan)
    reading._read_into(entry, target, first, check_finite=True)
    assert np.array_equal(target.numpy(), values[first : first + 2])


def test_a_file_with_minus_128_is_packed_anew_and_one_with_nan_refused(tmp_path: Path) -> None:
    config = next(config for config in CASES.values() if config.hidden_size % 32 == 0)
    store.save(trained(config), tmp_path / "model")
    export(tmp_path / "model", tmp_path / "model.gguf", dtype="q8_0")
    entry = next(e for e in read_header(tmp_path / "model.gguf").tensors.values() if e.kind.name == "Q8_0")
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    content[entry.offset + 2] = 128
    (tmp_path / "low.gguf").write_bytes(content)
    low = store.load(tmp_path / "low.gguf", weights="int8").state_dict()
    assert min(int(t.amin()) for t in low.values() if t.dtype == torch.int8) == -127
    content[entry.offset : entry.offset + 2] = np.float16("nan").tobytes()
    (tmp_path / "nan.gguf").write_bytes(content)
    with pytest.raises(ConsiliumError, match="not finite"):
        store.load(tmp_path / "nan.gguf", weights="int8", check_finite=True)


@pytest.mark.parametrize("packing", TYPES)
@pytest.mark.parametrize("far", [2.0**-30, 2.0**30], ids=["small", "large"])
def test_values_beyond_the_range_of_scales_are_refused_by_name(
    packing: Packing, far: float, tmp_path: Path
) -> None:
    """Keys behind a norm may have any size, and small ones became zeros that nobody saw."""
    model = lively(DEEPSEEK)
    weight = model.get_parameter("layers.1.attention.kv_down.weight")
    with torch.no_grad():
        weight.mul_(far)
    store.save(model, tmp_path / "model")
    message = rf"kv_down\.weight has [\d.e+-]+ as its largest value, and {packing} is for .* take fp8"
    with pytest.raises(ConsiliumError, match=message):
        store.load(tmp_path / "model", weights=packing)
    with pytest.raises(ConsiliumError, match=message):
        pack_all(model, packing)
    found = store.load(tmp_path / "model", dtype="float32", weights="fp8").state_dict()
    values = (found[f"layers.1.attention.kv_down.{part}"] for part in ("weight", "weight_scales"))
    assert relative_error(unpacked(*values, weight.shape[1]), weight) < 0.03


@pytest.mark.parametrize("packing", TYPES)
@pytest.mark.parametrize("end", [0, 1], ids=["least", "most"])
def test_values_at_the_ends_of_the_range_keep_their_bits(packing: Packing, end: int) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    least, error = range_of(packing)[end] / weight.abs().amax(), {"int8": 0.02, "int4": 0.1, "uint4": 0.1}
    assert (
        relative_error(unpacked(*pack_values(weight * least, packing), 96), weight * least) < error[packing]
    )


def test_a_matrix_of_zeros_is_packed(tmp_path: Path) -> None:
    model = lively(DEEPSEEK)
    with torch.no_grad():
        model.get_parameter("layers.1.attention.o.weight").zero_()
    store.save(model, tmp_path / "model")
    found = store.load(tmp_path / "model", weights="int4").state_dict()
    assert (found["layers.1.attention.o.weight_scales"] == 0).all()


def test_progress_ends_with_all_bytes(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    store.save(lively(SWITCH), tmp_path / "model")
    packed.load_packed(store.open_folder(tmp_path / "model"), "int4", lambda *told: heard.append(told))
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert heard[-1][0] == heard[-1][1]
