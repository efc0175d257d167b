"""What no published code computes, and what of theirs we do not: refused by name, never approximated."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.architectures import BEYOND_ALL, KINDS, described
from checkpoint.keys import (
    BOTH_MULTIPLIERS,
    NAMED,
    YARN_KEYS,
    altered,
    folder_with,
    foreign,
    with_gqa,
    with_latent,
    with_moe,
)
from checkpoint.models import deepseek_v3, llama, mixtral, windowed
from consilium.checkpoint.hf.architecture import Architecture, architecture
from consilium.checkpoint.hf.config import config_from_folder, to_hugging_face
from consilium.checkpoint.hf.read import from_hugging_face
from consilium.config.attention import GQA, Rope
from consilium.config.balance import AdaptiveLoss, Balance, SignBias
from consilium.config.model import Model
from consilium.config.moe import AlwaysOn, Capacity, SigmoidGated
from consilium.config.router import ClampedSum, Jitter, LearnedNoise, LinearGate, Raw, Softcap, Standardise
from consilium.errors import ConsiliumError


@pytest.mark.parametrize(
    "config",
    [
        with_gqa(qkv_bias=True, qk_norm="head"),
        with_gqa(qk_norm="full"),
        with_gqa(softcap=30.0),
        with_gqa(window=9, full_layers=(1,)),
        with_gqa(window=9, qk_norm="head", rope=Rope(fraction=0.5)),
        windowed(mixtral(), 9, 0),
        windowed(NAMED["olmoe"], 9),
        windowed(with_moe(mixtral(), shared=AlwaysOn(count=1, width=12)), 9),
        with_gqa(rope=Rope(fraction=0.5)),
        dataclasses.replace(llama(), norms="around"),
        dataclasses.replace(llama(), embedding_scale=2.0),
        dataclasses.replace(llama(), logit_scale=2.0),
        dataclasses.replace(mixtral(), norms="around"),
        dataclasses.replace(mixtral(), moe_every=2, dense=llama().dense),
        dataclasses.replace(deepseek_v3(), logit_scale=0.5),
        with_moe(mixtral(), latent=8),
        with_moe(deepseek_v3(), latent=8),
        with_gqa(scale=1.0),
        with_gqa(rope=Rope(interleaved=True)),
        dataclasses.replace(deepseek_v3(), norm_epsilon=1e-5),
        dataclasses.replace(deepseek_v3(), moe_every=2),
        with_latent(kv_norm="none"),
        with_latent(qkv_bias=True),
        with_latent(nope_dim=0),
        with_latent(rope=Rope(repeats=2)),
        with_moe(mixtral(), activation="gelu"),
        with_moe(mixtral(), admission=Capacity(factor=1.0, scope="always")),
        with_moe(mixtral(), admission=Capacity(factor=1.0), balance=Balance(losses=(AdaptiveLoss(),))),
        with_moe(deepseek_v3(), shared=SigmoidGated(width=10)),
        altered(mixtral(), **BEYOND_ALL),
        altered(mixtral(), transforms=(Softcap(cap=3.0),)),
        altered(mixtral(), transforms=(Standardise(epsilon=0.1),)),
        altered(mixtral(), transforms=(Standardise(),), scale=2.0),
        altered(mixtral(), noise=LearnedNoise(), weight=Raw()),
        altered(mixtral(), projection=LinearGate(bias=True)),
        altered(mixtral(), weight_on="input"),
        altered(mixtral(), weight=ClampedSum(minimum=0.1)),
        altered(deepseek_v3(), scale=2.0, offset="logits"),
    ],
    ids=lambda config: "",
)
def test_what_no_published_code_computes_is_not_written_as_its_own(config: Model, tmp_path: Path) -> None:
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


def test_the_small_models_below_are_of_the_architecture_that_they_are_called_by() -> None:
    assert all(name.startswith(str(architecture(config))) for name, config in NAMED.items())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"rope_parameters": YARN_KEYS | {"truncate": False}}),
        ("llama", {"rope_parameters": YARN_KEYS | {"mscale_all_dim": 1.0}}),
        ("llama", {"rope_parameters": YARN_KEYS | BOTH_MULTIPLIERS | {"attention_factor": 1.1}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
        ("llama", {"rope_parameters": ["yarn"]}),
        ("deepseek_v2", {"norm_topk_prob": True}),
        ("deepseek_v2", {"topk_method": "noaux_tc"}),
        ("deepseek_v2", {"moe_layer_freq": 2}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("deepseek_v3", {"topk_method": "greedy"}),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 100}),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}),
        ("qwen3", {"attention_bias": True}),
        ("qwen2_moe", {"mlp_only_layers": [1]}),
        ("qwen2_moe", {"mlp_only_layers": [2, 3]}),
        ("qwen3_moe", {"mlp_only_layers": [4]}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 100}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 3}),
        ("qwen3_moe", {"attention_bias": True}),
        ("olmoe", {"clip_qkv": 8.0}),
        ("olmoe", {"attention_bias": True}),
    ],
)
def test_an_option_that_we_do_not_compute_is_refused_by_name(
    name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    keys = foreign(NAMED[name]) | change
    with pytest.raises(
        ConsiliumError, match=r"config\.json: \w+ .* is not computed here; use a model without it\."
    ):
        config_from_folder(folder_with(keys, tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtrall"}, "architecture 'mixtrall' is not known here. Did you mean 'mixtral'?"),
        ({"model_type": None, "architectures": None}, "architecture 'None' is not known here"),
        ({"model_type": None, "architectures": ["Gemma"]}, "architecture 'Gemma' is not known here"),
        ({"hidden_size": "16"}, "hidden_size is '16' and must be a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0 and must be a positive whole number"),
        ({"vocab_size": None}, "vocab_size is None and must be a positive whole number"),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads is 3 and must be a divisor of num_attention_heads, 4",
        ),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small' and must be a positive number"),
        (
            {"tie_word_embeddings": "yes please"},
            "tie_word_embeddings is 'yes please' and must be true or false",
        ),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9 and must be at most the number of experts, 4"),
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


@pytest.mark.parametrize(
    ("name", "change", "window", "full"),
    [
        ("llama", {"model_type": "mistral", "sliding_window": 100}, 100, ()),
        ("mixtral", {"sliding_window": 4095}, 4095, ()),
        ("mixtral", {"sliding_window": 4096}, None, ()),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}, 100, (0,)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 2}, None, ()),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 100, "max_window_layers": 0}, None, ()),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}, None, ()),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            9,
            (1,),
        ),
        (
            "qwen2_moe",
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 4},
            9,
            (1, 3, 4),
        ),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
            9,
            (),
        ),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4096}, None, ()),
    ],
)
def test_a_window_is_that_of_the_layers_that_the_family_means(
    name: str, change: dict[str, Any], window: int | None, full: tuple[int, ...], tmp_path: Path
) -> None:
    attention = config_from_folder(folder_with(foreign(NAMED[name]) | change, tmp_path)).attention
    assert isinstance(attention, GQA)
    assert (attention.window, attention.full_layers) == (window, full)


@pytest.mark.parametrize("kinds", [["sliding_attention"], ["full_attention"] * 3])
def test_kinds_of_other_layers_than_there_are_are_refused(kinds: list[str], tmp_path: Path) -> None:
    keys = foreign(NAMED["qwen2"]) | {"use_sliding_window": True, "sliding_window": 9, "layer_types": kinds}
    with pytest.raises(ConsiliumError, match=r"layer_types is .* and must be a list of num_hidden_layers, 2"):
        config_from_folder(folder_with(keys, tmp_path))


ROPE_KEYS = ["rope_type", "rope_theta", "factor", "attention_factor", "mscale", "mscale_all_dim", "truncate"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=3)
    | st.integers(-2, 9)
    | st.sampled_from([10**9, 10**18, 10**400]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(ROPE_KEYS), inner, max_size=3)
    ),
    max_leaves=4,
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(data=st.data())
def test_any_value_of_any_key_is_read_or_refused_in_one_sentence(
    kind: Architecture, data: st.DataObject
) -> None:
    keys = foreign(data.draw(described(kind)))
    for key in data.draw(st.lists(st.sampled_from(sorted(keys)), min_size=1, max_size=2)):
        keys[key] = data.draw(VALUES)
    said = ""
    try:
        from_hugging_face(keys, Path("config.json"))
    except ConsiliumError as error:
        said = str(error)
    assert said.startswith("config.json: ") or not said
    assert "\n" not in said


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
