"""A model survives the way through a folder bit for bit, in every layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from torch import Tensor

from checkpoint.models import ALL, answer, deepseek_v3, llama, mixtral, representable, saved, trained
from consilium.checkpoint import safetensors_io, store
from consilium.checkpoint.folders import checkpoint_in
from consilium.checkpoint.hf.architecture import architecture
from consilium.checkpoint.hf.naming import TABLES, named
from consilium.config.model import MTP, Model
from consilium.errors import ConsiliumError
from consilium.model.build import build


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("name", ALL)
def test_what_was_saved_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = trained(ALL[name])
    store.save(model, tmp_path / "model")
    loaded = store.load(tmp_path / "model")
    assert loaded.config == model.config
    assert_same(loaded.state_dict(), model.state_dict())
    assert torch.equal(answer(loaded), answer(model))


@pytest.mark.parametrize("written", ["float32", "bfloat16"])
@pytest.mark.parametrize("read", [None, "float32", "bfloat16"])
def test_the_selection_bias_is_bit_equal_under_any_dtype(
    written: str, read: str | None, tmp_path: Path
) -> None:
    model = trained(deepseek_v3(depth=1), dtype=written)
    store.save(model, tmp_path / "model")
    loaded = store.load(tmp_path / "model", dtype=read)
    before, after = model.state_dict(), loaded.state_dict()
    biases = [name for name in before if name.endswith("bias_E")]
    assert len(biases) == 3
    for name in biases:
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], before[name])
    assert str(after["embed.weight"].dtype) == f"torch.{read or written}"


@given(config=representable())
def test_every_tensor_is_exactly_its_parts_on_disk(config: Model) -> None:
    kind = architecture(config)
    assert kind is not None
    state, blank = trained(config).state_dict(), build(config, seed=1).state_dict()
    written = list(named(config, state, TABLES[kind][0]))
    assert len({name for name, _ in written}) == len(written)
    assert all(tensor.is_contiguous() for _, tensor in written)
    assert sum(tensor.numel() for _, tensor in written) == sum(tensor.numel() for tensor in state.values())
    on_disk = {name: tensor.clone() for name, tensor in written}
    for name, target in named(config, blank, TABLES[kind][0]):
        target.copy_(on_disk[name])
    assert_same(blank, state)


def test_weights_go_into_a_model_that_is_there_and_leave_nothing_of_it(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", deepseek_v3(depth=1))
    model = build(deepseek_v3(depth=1), seed=5)
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    store.load_weights(model, folder)
    assert_same(model.state_dict(), store.load(folder).state_dict())


def test_weights_of_another_model_are_refused_by_name_before_anything_changes(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", mixtral())
    model = trained(llama())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConsiliumError, match=r"missing \(model\.layers\.0\.mlp\.gate_proj\.weight"):
        store.load_weights(model, folder)
    assert_same(model.state_dict(), before)


def test_swapped_experts_change_the_answer(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", mixtral(), manifest=False)
    before = answer(store.load(folder))
    tensors = safetensors_io.read(folder / "model.safetensors")
    one, two = (f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight" for e in (0, 1))
    tensors[one], tensors[two] = tensors[two], tensors[one]
    (folder / "model.safetensors").unlink()
    safetensors_io.write(folder / "model.safetensors", tensors)
    assert not torch.equal(answer(store.load(folder)), before)


def test_a_model_may_be_saved_over_the_folder_it_came_from(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llama())
    model = store.load(folder)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    store.save(model, folder)
    assert_same(store.load(folder).state_dict(), expected)


@dataclass(frozen=True)
class Words:
    eos_id: int = 7
    bos_id: int | None = 3

    def files(self) -> Mapping[str, bytes]:
        return {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}


def test_the_tokenizer_goes_along_and_names_the_end_of_text(tmp_path: Path) -> None:
    store.save(trained(llama()), tmp_path / "model", tokenizer=Words())
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == b"{}"
    for name in ("config.json", "generation_config.json"):
        data = json.loads((tmp_path / "model" / name).read_text())
        assert (data["bos_token_id"], data["eos_token_id"]) == (3, 7)


def test_training_state_comes_back_exactly(tmp_path: Path) -> None:
    tensors = {
        "moment": torch.randn(3, 5),
        "step": torch.tensor(12.0),
        "generator": torch.arange(200, dtype=torch.uint8),
        "load_E": torch.tensor([2**40, -1]),
        "none": torch.zeros(0, 4),
        "flag": torch.tensor([True, False]),
    }
    state = store.TrainingState(tensors, {"step": 12, "rate": 0.1, "corpus_sha256": "ab", "tokens": 2**60})
    store.save(trained(llama()), tmp_path / "model", training_state=state)
    found = store.load_training_state(tmp_path / "model")
    assert_same({name: found.tensors[name] for name in tensors}, tensors)
    assert found.scalars == state.scalars
    store.load(tmp_path / "model")


def test_a_folder_without_training_state_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="has no training_state, so no training can go on from it"):
        store.load_training_state(saved(tmp_path / "model", llama()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_when_asked(value: float, tmp_path: Path) -> None:
    model = trained(deepseek_v3())
    model.state_dict()["layers.2.moe.experts.down"][5, 3, 2] = value
    store.save(model, tmp_path / "model")
    store.load(tmp_path / "model")
    with pytest.raises(
        ConsiliumError, match=r"tensor model\.layers\.2\.mlp\.experts\.5\.down_proj\.weight holds NaN"
    ):
        store.load(tmp_path / "model", check_finite=True)


def test_announced_prediction_modules_that_the_file_lacks_are_left_out(tmp_path: Path) -> None:
    """As transformers does in every DeepSeek-V3 configuration."""
    folder = saved(tmp_path / "model", deepseek_v3(), manifest=False)
    data = json.loads((folder / "config.json").read_text())
    del data["consilium"]
    (folder / "config.json").write_text(json.dumps(data | {"num_nextn_predict_layers": 1}))
    assert store.load(folder).config.mtp == MTP(depth=0)


def test_loading_finds_what_a_crash_left_moved_aside_and_writes_nothing(tmp_path: Path) -> None:
    aside = saved(tmp_path / "model", llama()).rename(tmp_path / f".model.old-{'0' * 16}")
    assert store.load(tmp_path / "model").config == llama()
    assert store.open_folder(tmp_path / "model").config == llama()
    assert checkpoint_in(tmp_path / "model") == aside
    assert [path.name for path in tmp_path.iterdir()] == [aside.name]


@pytest.mark.parametrize("name", ["absent", "file"])
def test_what_is_not_a_folder_is_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(ConsiliumError, match=rf"{name}/config\.json"):
        store.load(tmp_path / name)


def test_code_in_a_folder_never_runs(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llama(), manifest=False)
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(data | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}})
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    store.load(folder)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "layers", "experts", "width", "depth"])
@pytest.mark.parametrize("value", [10**5, 10**12])
def test_a_small_file_cannot_ask_for_a_huge_model(field: str, value: int, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", deepseek_v3(depth=1), manifest=False)
    own = json.loads((folder / "config.json").read_text())["consilium"]
    part = {"experts": own["moe"], "width": own["moe"], "depth": own["mtp"]}.get(field, own)
    assert field in part
    part[field] = value
    (folder / "config.json").write_text(json.dumps({"consilium": own}))
    with pytest.raises(ConsiliumError, match=r"config\.json"):
        store.load(folder)


def test_a_training_state_is_hashed_unless_it_was_compared_with_its_manifest(tmp_path: Path) -> None:
    state = store.TrainingState({"moment": torch.ones(3)}, {"step": 12})
    folder = tmp_path / "model"
    store.save(trained(llama()), folder, training_state=state)
    (folder / store.SCALARS).write_text((folder / store.SCALARS).read_text().replace("12", "13"))
    with pytest.raises(ConsiliumError, match=r"state\.json was changed"):
        store.load_training_state(folder)
    store.load_weights(build(llama(), seed=5), folder)
    assert store.load_training_state(folder, verified=True).scalars == {"step": 13}
