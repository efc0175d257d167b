"""transformers opens what we save, and we open what it saves, with the same answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from checkpoint.keys import NAMED, folder_with, foreign
from checkpoint.models import HUGGING_FACE, answer, deepseek_v3, saved, trained
from consilium.checkpoint import safetensors_io, store
from consilium.checkpoint.hf.config import config_from_folder, to_hugging_face
from consilium.data.tokenizer import Tokenizer
from consilium.recipes.catalogue import recipe
from support import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
TOLERANCE = 1e-5
IDS_BS = torch.arange(12).reshape(2, 6)


def opened(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model as transformers reads it, and what it found missing, unexpected or mismatched."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
        experts_implementation="eager",
    )
    return model.eval(), report


@torch.no_grad()
def their_answer(model: Any) -> torch.Tensor:
    return model(IDS_BS).logits


@pytest.mark.parametrize("name", [name for name in HUGGING_FACE if not name.endswith("mtp")])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_opens_our_folder_with_nothing_missing_or_left_over(
    name: str, *, tied: bool, tmp_path: Path
) -> None:
    model = trained(dataclasses.replace(HUGGING_FACE[name], tied=tied))
    store.save(model, tmp_path / "model")
    theirs, report = opened(tmp_path / "model")
    assert not any(report.values()), report
    assert relative_error(their_answer(theirs), answer(model)) < TOLERANCE


def test_prediction_modules_lie_where_the_released_file_has_them(tmp_path: Path) -> None:
    """At 61 layers transformers skips them silently, at others it reports them; the answers are the same."""
    model = trained(deepseek_v3(depth=2))
    store.save(model, tmp_path / "model")
    theirs, report = opened(tmp_path / "model")
    layers = model.config.layers
    assert {".".join(key.split(".")[:3]) for key in report["unexpected_keys"]} == {
        f"model.layers.{layers}",
        f"model.layers.{layers + 1}",
    }
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert relative_error(their_answer(theirs), answer(model)) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in HUGGING_FACE if not name.endswith("mtp")])
def test_we_open_what_transformers_saves_and_write_the_same_tensors(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "first", HUGGING_FACE[name])
    theirs, _ = opened(tmp_path / "first")
    del theirs.config.consilium
    theirs.save_pretrained(tmp_path / "theirs")
    assert "consilium" not in json.loads((tmp_path / "theirs" / "config.json").read_text())
    ours = store.load(tmp_path / "theirs")
    assert relative_error(answer(ours), their_answer(theirs)) < TOLERANCE
    store.save(ours, tmp_path / "again")
    before = safetensors_io.read(tmp_path / "theirs" / "model.safetensors")
    after = safetensors_io.read(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("system", "size", "theirs", "differs"),
    [
        (
            "deepseek-v3",
            "671b",
            transformers.DeepseekV3Config,
            {"initializer_range", "max_position_embeddings"},
        ),
        (
            "mixtral",
            "8x7b",
            transformers.MixtralConfig,
            {"head_dim", "max_position_embeddings", "router_aux_loss_coef"},
        ),
        ("llama", "7b", transformers.LlamaConfig, {"max_position_embeddings", "rms_norm_eps"}),
        (
            "qwen-moe",
            "a2.7b",
            transformers.Qwen2MoeConfig,
            {"intermediate_size", "max_position_embeddings", "max_window_layers", "sliding_window"},
        ),
        (
            "qwen3-moe",
            "30b",
            transformers.Qwen3MoeConfig,
            {"intermediate_size", "max_position_embeddings", "norm_topk_prob", "num_hidden_layers"},
        ),
    ],
)
def test_the_published_sizes_are_the_defaults_of_transformers(
    system: str, size: str, theirs: Any, differs: set[str]
) -> None:
    written = to_hugging_face(recipe(f"{system}:{size}"), dtype="bfloat16")
    defaults = theirs().to_dict()
    scaling = {"rope_parameters", "rope_scaling", "dtype", "bos_token_id", "eos_token_id", "architectures"}
    compared = (written.keys() & defaults.keys()) - scaling
    assert len(compared) > 15
    assert {key for key in compared if written[key] != defaults[key]} == differs


def test_the_tokenizer_has_a_class_that_every_version_knows(tmp_path: Path) -> None:
    """Version 5 itself writes a class that earlier versions and other readers cannot load."""
    store.save(trained(NAMED["mixtral"]), tmp_path / "model", tokenizer=Tokenizer.of_bytes())
    keys = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert keys["tokenizer_class"] == "PreTrainedTokenizerFast"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs.encode("naïve 专家") == Tokenizer.of_bytes().encode("naïve 专家")


@pytest.mark.parametrize("name", NAMED)
def test_both_spellings_are_read_as_one(name: str, tmp_path: Path) -> None:
    config = NAMED[name]
    keys = to_hugging_face(config, dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(keys))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read.dtype == torch.bfloat16
    assert read.rope_parameters["rope_theta"] == config.attention.rope.theta
    for old, new in (("rope_theta", "rope_parameters"), ("torch_dtype", "dtype")):
        assert old in keys
        assert new in keys


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_the_number_of_experts_has_both_its_names(name: str, tmp_path: Path) -> None:
    """Version 5 of transformers keeps one of them, other readers look for the other."""
    config = NAMED[name]
    assert config.moe is not None
    keys = to_hugging_face(config, dtype="bfloat16")
    assert keys["num_experts"] == keys["num_local_experts"] == config.moe.experts
    for kept in ("num_experts", "num_local_experts"):
        one = {key: value for key, value in foreign(config).items() if not key.endswith("_experts")}
        found = config_from_folder(folder_with(one | {kept: config.moe.experts}, tmp_path))
        assert found.moe is not None
        assert found.moe.experts == config.moe.experts
