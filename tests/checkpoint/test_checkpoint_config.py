"""config.json in both directions: what others read, what we read of others, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from checkpoint.models import ALL, HUGGING_FACE, deepseek_v2, deepseek_v3, llama, mixtral, representable
from consilium.checkpoint.hf_architecture import architecture
from consilium.checkpoint.hf_config import config_from_folder, generation_config, to_hugging_face
from consilium.config.attention import GQA, MLA, Rope, Yarn
from consilium.config.balance import AdaptiveLoss, Balance, SignBias
from consilium.config.model import Model
from consilium.config.moe import Capacity, MoE, SigmoidGated
from consilium.config.router import Jitter, LearnedNoise, LinearGate, Softcap
from consilium.errors import ConsiliumError
from consilium.recipes.catalogue import recipe


def folder_with(keys: object, folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


def foreign(config: Model) -> dict[str, Any]:
    """The keys of ``config`` without our own."""
    return {
        key: value for key, value in to_hugging_face(config, dtype="bfloat16").items() if key != "consilium"
    }


def computed(config: Model) -> Model:
    """What of ``config`` decides the answers: no losses, drops or initialisation."""
    return dataclasses.replace(
        config,
        init=llama().init,
        family="",
        dense=config.dense if config.dense_first or config.moe is None else None,
        moe=None
        if config.moe is None
        else dataclasses.replace(config.moe, balance=Balance(), admission=mixtral_moe().admission),
    )


def mixtral_moe() -> MoE:
    moe = mixtral().moe
    assert moe is not None
    return moe


@pytest.mark.parametrize("name", ALL)
def test_our_own_configuration_comes_back_exactly(name: str, tmp_path: Path) -> None:
    folder = folder_with(to_hugging_face(ALL[name], dtype="float32"), tmp_path)
    assert config_from_folder(folder) == ALL[name]


@given(config=representable())
def test_the_keys_of_others_describe_the_same_computation(
    config: Model, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = folder_with(foreign(config), tmp_path_factory.mktemp("config"))
    assert computed(config_from_folder(folder)) == computed(config)


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
    ],
)
def test_published_systems_get_their_architecture(name: str, kind: str, tmp_path: Path) -> None:
    config = recipe(name)
    keys = to_hugging_face(config, dtype="bfloat16")
    assert keys["model_type"] == kind
    if kind != "consilium":
        assert computed(config_from_folder(folder_with(foreign(config), tmp_path))) == computed(config)


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


@pytest.mark.parametrize("depth", [0, 1])
def test_prediction_layers_are_announced_only_where_there_are_some(depth: int) -> None:
    assert foreign(deepseek_v3(depth=depth))["num_nextn_predict_layers"] == depth


def altered(config: Model, **router: Any) -> Model:
    assert config.moe is not None
    changed = dataclasses.replace(config.moe.router, **router)
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, router=changed))


def with_moe(config: Model, **changes: Any) -> Model:
    assert config.moe is not None
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes))


def with_gqa(**changes: Any) -> Model:
    attention = GQA(**({"heads": 4, "kv_heads": 2, "head_dim": 8} | changes))
    return dataclasses.replace(llama(), attention=attention)


@pytest.mark.parametrize(
    "config",
    [
        with_gqa(qkv_bias=True),
        with_gqa(qk_norm="head"),
        with_gqa(softcap=30.0),
        with_gqa(scale=1.0),
        with_gqa(rope=Rope(interleaved=True)),
        dataclasses.replace(deepseek_v3(), norm_epsilon=1e-5),
        dataclasses.replace(deepseek_v3(), moe_every=2),
        with_moe(mixtral(), activation="gelu"),
        with_moe(mixtral(), admission=Capacity(factor=1.0, scope="always")),
        with_moe(mixtral(), balance=Balance(losses=(AdaptiveLoss(),))),
        with_moe(deepseek_v3(), shared=SigmoidGated(width=10)),
        altered(mixtral(), noise=LearnedNoise()),
        altered(mixtral(), transforms=(Softcap(cap=3.0),)),
        altered(mixtral(), projection=LinearGate(bias=True)),
        altered(mixtral(), scale=2.0),
        altered(mixtral(), weight_on="input"),
        altered(deepseek_v3(), scale=2.0, offset="logits"),
    ],
    ids=lambda config: "",
)
def test_what_transformers_computes_differently_is_not_written_as_its_own(
    config: Model, tmp_path: Path
) -> None:
    assert architecture(config) is None
    keys = to_hugging_face(config, dtype="float32")
    assert keys["model_type"] == "consilium"
    assert config_from_folder(folder_with(keys, tmp_path)) == config


@pytest.mark.parametrize(
    "config",
    [
        altered(mixtral(), noise=Jitter()),
        with_moe(mixtral(), admission=Capacity(factor=1.0)),
        with_gqa(scale=8**-0.5),
        with_moe(deepseek_v3(), balance=Balance()),
        with_moe(deepseek_v3(), balance=Balance(bias=SignBias(rate=0.1))),
    ],
    ids=lambda config: "",
)
def test_what_acts_in_training_only_does_not_change_the_architecture(config: Model) -> None:
    assert architecture(config) is not None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("llama", {"rope_parameters": ["yarn"]}),
        ("mixtral", {"sliding_window": 4096}),
        ("deepseek_v2", {"norm_topk_prob": True}),
        ("deepseek_v2", {"topk_method": "noaux_tc"}),
        ("deepseek_v2", {"moe_layer_freq": 2}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("deepseek_v3", {"topk_method": "greedy"}),
    ],
)
def test_an_option_that_we_do_not_compute_is_refused_by_name(
    name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    keys = foreign(HUGGING_FACE[name]) | change
    with pytest.raises(
        ConsiliumError, match=r"config\.json: \w+ .* is not computed here; use a model without it\."
    ):
        config_from_folder(folder_with(keys, tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtrall"}, "architecture 'mixtrall' is not known here. Did you mean 'mixtral'?"),
        ({"model_type": None}, "architecture 'None' is not known here"),
        ({"hidden_size": "16"}, "hidden_size is '16' and must be a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0 and must be a positive whole number"),
        ({"vocab_size": None}, "vocab_size is None and must be a positive whole number"),
        ({"num_key_value_heads": 3}, "4 heads are not divisible by 3 kv_heads"),
        ({"rms_norm_eps": "small"}, "norm_epsilon"),
        ({"tie_word_embeddings": "yes please"}, "tied"),
        ({"num_experts_per_tok": 9}, "top-9 of 4 experts is impossible"),
    ],
)
def test_keys_that_make_no_sense_are_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConsiliumError) as caught:
        config_from_folder(folder_with(foreign(mixtral()) | change, tmp_path))
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_that_contradict_our_own_are_refused(tmp_path: Path) -> None:
    keys = to_hugging_face(mixtral(), dtype="float32") | {"num_experts_per_tok": 3}
    with pytest.raises(
        ConsiliumError, match="num_experts_per_tok is 3, but the key 'consilium' beside it says 2"
    ):
        config_from_folder(folder_with(keys, tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10**5, "\x00", '"text"', " " * (16 * 2**20 + 1)])
def test_a_config_that_is_not_an_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConsiliumError, match=r"config\.json is not"):
        config_from_folder(tmp_path)


def test_a_folder_without_a_config_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="give the folder of a saved model"):
        config_from_folder(tmp_path / "absent")


def test_yarn_corrections_that_transformers_would_guess_are_spelt_out(tmp_path: Path) -> None:
    yarn = Yarn(factor=8.0, original_length=512, mscale=0.5)
    config = with_gqa(rope=Rope(scaling=yarn))
    assert foreign(config)["rope_parameters"]["attention_factor"] == yarn.rotation_scale
    with pytest.raises(ConsiliumError, match="rope_parameters"):
        config_from_folder(folder_with(foreign(config), tmp_path))


@pytest.mark.parametrize("end", [None, 0, 5])
def test_generation_starts_and_ends_with_the_end_of_text(end: int | None) -> None:
    assert generation_config(end).get("eos_token_id") == end


def test_reading_a_configuration_does_not_import_torch() -> None:
    code = "import sys, consilium.checkpoint.hf_config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_older_spelling_of_scaled_positions_is_read(tmp_path: Path) -> None:
    keys = foreign(deepseek_v2())
    del keys["rope_parameters"]
    found = config_from_folder(folder_with(keys, tmp_path)).attention
    assert isinstance(found, MLA)
    assert found.rope == deepseek_v2().attention.rope
