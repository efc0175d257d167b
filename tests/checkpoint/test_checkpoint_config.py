"""config.json in both directions: what others read, and what we read of others."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.architectures import KINDS, described
from checkpoint.keys import YARN_KEYS, computed, folder_with, foreign, with_gqa, with_moe
from checkpoint.models import ALL, deepseek_v2, deepseek_v3, llama
from consilium.checkpoint.hf.architecture import Architecture, architecture
from consilium.checkpoint.hf.config import config_from_folder, to_hugging_face
from consilium.checkpoint.hf.families import FAMILIES
from consilium.checkpoint.hf.naming import TABLES
from consilium.config.attention import MLA, Rope, Unscaled, Yarn
from consilium.config.balance import Balance, BalanceLoss, ImportanceLoss, LoadLoss, SequenceLoss, SwitchLoss
from consilium.recipes.catalogue import recipe, systems
from consilium.recipes.recipe import Recipe


@pytest.mark.parametrize("name", ALL)
def test_our_own_configuration_comes_back_exactly(name: str, tmp_path: Path) -> None:
    folder = folder_with(to_hugging_face(ALL[name], dtype="float32"), tmp_path)
    assert config_from_folder(folder) == ALL[name]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(data=st.data())
def test_the_keys_of_others_describe_the_same_computation(
    kind: Architecture, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = data.draw(described(kind))
    keys = foreign(config)
    assert keys["model_type"] == kind
    assert keys["architectures"] == [FAMILIES[kind].class_name]
    folder = folder_with(keys, tmp_path_factory.mktemp("config"))
    assert computed(config_from_folder(folder)) == computed(config)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5)
@given(data=st.data())
def test_a_file_without_a_model_type_is_known_by_its_class(
    kind: Architecture, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = data.draw(described(kind))
    keys = foreign(config)
    del keys["model_type"]
    folder = folder_with(keys, tmp_path_factory.mktemp("config"))
    assert computed(config_from_folder(folder)) == computed(config)


def test_all_architectures_are_drawn() -> None:
    assert set(KINDS) == TABLES.keys() == {family.layout for family in FAMILIES.values()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama:7b", "llama"),
        ("mixtral:8x7b", "mixtral"),
        ("mixtral:8x22b", "mixtral"),
        ("deepseek-v2:236b", "deepseek_v2"),
        ("deepseek-v2:lite", "deepseek_v2"),
        ("deepseek-v3:671b", "deepseek_v3"),
        ("deepseek-v3:1b", "deepseek_v3"),
        ("deepseek-v3:tiny", "deepseek_v3"),
        ("switch:base", "consilium"),
        ("llama:70b", "llama"),
        ("qwen2:0.5b", "qwen2"),
        ("qwen2:72b", "qwen2"),
        ("qwen3:0.6b", "qwen3"),
        ("qwen3:32b", "qwen3"),
        ("qwen-moe:a2.7b", "qwen2_moe"),
        ("qwen-moe:57b", "qwen2_moe"),
        ("qwen3-moe:30b", "qwen3_moe"),
        ("qwen3-moe:235b", "qwen3_moe"),
        ("deepseek-moe:16b", "deepseek"),
        ("deepseek-moe:145b", "deepseek"),
        ("grok-1:314b", "grok-1"),
        ("skywork-moe:146b", "skywork_moe"),
        ("llama-moe:3.5b-4-16", "llama_moe"),
        ("llama-moe:3.5b-2-14-residual", "consilium"),
        ("nemotron-moe:e8g8t8", "consilium"),
        ("latent-moe:super", "consilium"),
        ("gshard:600b", "consilium"),
        ("shazeer:256", "consilium"),
    ],
)
def test_published_systems_get_their_architecture(name: str, kind: str, tmp_path: Path) -> None:
    config = recipe(name)
    keys = to_hugging_face(config, dtype="bfloat16")
    assert keys["model_type"] == kind
    if kind != "consilium":
        assert computed(config_from_folder(folder_with(foreign(config), tmp_path))) == computed(config)


@pytest.mark.parametrize("system", [one for one in systems() if one.hugging_face], ids=lambda one: one.name)
def test_every_size_of_a_recipe_has_the_architecture_that_the_recipe_names(system: Recipe) -> None:
    assert system.hugging_face is not None
    known = system.hugging_face
    # Released code has neither LLaMA-MoE's always-on experts nor the bias of Skywork-MoE's paper: these sizes
    # are saved in our own layout.
    ours = ("3.5b-2-14-residual", "146b-paper")
    published = [model for size, model in system.sizes.items() if size not in ours]
    found = {architecture(model) for model in published}
    assert found == {known.model_type}
    assert {FAMILIES[one].class_name for one in found if one} == {known.architecture}
    assert {id(TABLES[one][0]) for one in found if one} == {id(known.tensors)}


def test_the_released_keys_of_deepseek_v3_are_written() -> None:
    """Readers that know several DeepSeek models take softmax where scoring_func or topk_method is absent."""
    keys = to_hugging_face(recipe("deepseek-v3:671b"), dtype="bfloat16")
    released = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": 129280,
    }
    assert {key: keys[key] for key in released} == released
    scaling = {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    assert keys["rope_scaling"].items() >= {**scaling, "original_max_position_embeddings": 4096}.items()


@pytest.mark.parametrize(
    ("name", "losses"),
    [
        ("mixtral:tiny", (SwitchLoss(coefficient=0.02),)),
        ("qwen3-moe:tiny", (SwitchLoss(coefficient=0.003),)),
        ("grok-1:tiny", (SwitchLoss(coefficient=0.004),)),
        ("deepseek-moe:tiny", (SwitchLoss(coefficient=0.005),)),
        ("deepseek-moe:tiny", (SequenceLoss(coefficient=0.006),)),
        ("deepseek-v2:tiny", (SequenceLoss(coefficient=0.007),)),
        ("deepseek-v3:tiny", (SwitchLoss(coefficient=0.008),)),
        ("llama-moe:tiny", (ImportanceLoss(coefficient=0.09), LoadLoss(coefficient=0.09))),
        ("mixtral:tiny", ()),
        ("deepseek-v2:tiny", ()),
        ("llama-moe:tiny", ()),
    ],
)
def test_a_balance_loss_that_the_keys_can_say_comes_back(
    name: str, losses: tuple[BalanceLoss, ...], tmp_path: Path
) -> None:
    config = with_moe(recipe(name), balance=Balance(losses=losses))
    found = config_from_folder(folder_with(foreign(config), tmp_path)).moe
    assert found is not None
    assert found.balance.losses == losses


@pytest.mark.parametrize("depth", [0, 1])
def test_prediction_layers_are_announced_only_where_there_are_some(depth: int) -> None:
    assert foreign(deepseek_v3(depth=depth))["num_nextn_predict_layers"] == depth


@pytest.mark.parametrize("mscale", [0.5, 1.0, 2.0])
def test_yarn_corrections_that_transformers_would_guess_are_spelt_out(mscale: float, tmp_path: Path) -> None:
    yarn = Yarn(factor=8.0, original_length=512, mscale=mscale)
    config = with_gqa(rope=Rope(scaling=yarn))
    assert foreign(config)["rope_parameters"]["attention_factor"] == yarn.rotation_scale
    found = config_from_folder(folder_with(foreign(config), tmp_path)).attention.rope.scaling
    assert isinstance(found, Yarn)
    assert found.rotation_scale == pytest.approx(yarn.rotation_scale, rel=1e-15)
    assert found.softmax_scale == yarn.softmax_scale == 1


def test_an_attention_factor_that_a_file_leaves_out_is_the_papers(tmp_path: Path) -> None:
    """0.1 ln(factor) + 1 (2309.00071, equation 22)."""
    folder = folder_with(foreign(llama()) | {"rope_parameters": YARN_KEYS}, tmp_path)
    found = config_from_folder(folder).attention.rope.scaling
    assert not isinstance(found, Unscaled)
    assert found.rotation_scale == pytest.approx(0.1 * math.log(8) + 1, rel=1e-15)


def test_reading_a_configuration_does_not_import_torch() -> None:
    modules = "sys, consilium.checkpoint.hf.config, consilium.checkpoint.hf.generation"
    code = f"import {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_older_spelling_of_scaled_positions_is_read(tmp_path: Path) -> None:
    keys = foreign(deepseek_v2())
    del keys["rope_parameters"]
    found = config_from_folder(folder_with(keys, tmp_path)).attention
    assert isinstance(found, MLA)
    assert found.rope == deepseek_v2().attention.rope
