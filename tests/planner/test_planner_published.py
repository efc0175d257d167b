"""Published counts: to the last parameter where weights are released, else as printed."""

from __future__ import annotations

import dataclasses

import pytest

from consilium.config.attention import GQA
from consilium.config.model import Model
from consilium.planner.kv import values_per_token
from consilium.planner.parameters import parameters
from consilium.recipes.catalogue import recipe

# Total and active parameters of released checkpoints, MTP modules and selection biases left out.
EXACT = {
    "mixtral:8x7b": (46_702_792_704, 12_879_925_248),
    "mixtral:8x22b": (140_620_634_112, 39_152_031_744),
    "llama-moe:3.0b-2-16": (6_742_618_112, 2_955_161_600),
    "llama-moe:3.5b-4-16": (6_742_618_112, 3_496_226_816),
    "llama-moe:3.5b-2-8": (6_740_514_816, 3_494_123_520),
    "llama-moe:3.5b-2-14-residual": (6_742_091_904, 3_495_700_608),
    "deepseek-moe:16b": (16_375_728_128, 2_828_650_496),
    "deepseek-v2:236b": (235_741_434_880, 21_375_800_320),
    "deepseek-v2:lite": (15_706_484_224, 2_661_150_208),
    "deepseek-v3:671b": (671_026_404_352, 37_552_297_472 - 58 * 256),
    "qwen-moe:a2.7b": (14_315_784_192, 2_689_173_504),
    "qwen-moe:57b": (57_408_658_944, 14_249_270_784),
    "qwen3-moe:30b": (30_532_122_624, 3_353_032_704),
    "qwen3-moe:235b": (235_093_634_560, 22_190_763_520),
    "olmoe:7b": (6_919_161_856, 1_282_017_280),
    "skywork-moe:146b": (146_356_130_304, 22_691_271_168),
}
TOTAL = {
    "grok-1:314b": 315_684_820_992,
    "nemotron-moe:e8g8t8": 83_286_693_888,
    "nemotron-moe:e8g1t2": 83_275_683_840,
    "llama:deepseek-67b": 67_425_001_472,
    "llama:7b": 6_738_415_616,
}

# Active parameters in billions: with the input embedding, without it, without embedding and head.
ACTIVE = {
    "mixtral:8x7b": ("12.880", "12.749", "12.618"),
    "mixtral:8x22b": ("39.152", "38.955", "38.759"),
    "deepseek-moe:16b": ("2.829", "2.619", "2.409"),
    "deepseek-v2:236b": ("21.376", "20.852", "20.327"),
    "deepseek-v2:lite": ("2.661", "2.451", "2.242"),
    "deepseek-v3:671b": ("37.552", "36.626", "35.699"),
    "qwen-moe:a2.7b": ("2.689", "2.378", "2.067"),
    "qwen-moe:57b": ("14.249", "13.705", "13.160"),
    "qwen3-moe:30b": ("3.353", "3.042", "2.731"),
    "qwen3-moe:235b": ("22.191", "21.568", "20.946"),
    "grok-1:314b": ("83.757", "83.757", "82.951"),
    "skywork-moe:146b": ("22.691", "22.389", "22.087"),
    "nemotron-moe:e8g8t8": ("15.641", "14.068", "12.495"),
    "nemotron-moe:e8g1t2": ("25.294", "23.721", "22.148"),
    "llama:deepseek-67b": ("67.425", "66.586", "65.747"),
    "llama:7b": ("6.738", "6.607", "6.476"),
}


@pytest.mark.parametrize("name", EXACT)
def test_released_weights_are_counted_to_the_last_parameter(name: str) -> None:
    counts = parameters(recipe(name))
    assert (counts.total, counts.active) == EXACT[name]


@pytest.mark.parametrize("name", TOTAL)
def test_totals_are_counted_to_the_last_parameter(name: str) -> None:
    assert parameters(recipe(name)).total == TOTAL[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_agree_in_every_convention(name: str) -> None:
    model = recipe(name)
    counts = parameters(model)
    head = model.vocab_size * model.hidden_size
    shown = counts.active, counts.active_without_input_embedding, counts.active_without_input_embedding - head
    assert tuple(f"{count / 1e9:.3f}" for count in shown) == ACTIVE[name]


def test_v3_counts_its_prediction_module_apart() -> None:
    """11.610 B with the projection of [embedding; hidden], 11.507 B without it (printed: 11.5 B)."""
    extra = parameters(recipe("deepseek-v3")).mtp
    assert f"{extra / 1e9:.3f}" == "11.610"
    assert f"{(extra - 2 * 7168**2) / 1e9:.3f}" == "11.507"


@pytest.mark.parametrize(
    ("size", "billions"),
    [
        ("1t", 1031),
        ("600b", 618),
        ("200b", 206),
        ("150b", 155),
        ("50b", 51.5),
        ("37b", 38.7),
        ("12.5b", 12.9),
    ],
)
def test_gshard_is_the_arithmetic_of_its_table(size: str, billions: float) -> None:
    """Half of the layers have E experts of 2 x 1024 x 8192 weights; everything else is below a billion."""
    model = recipe(f"gshard:{size}")
    assert model.moe is not None
    experts = model.layers // 2 * model.moe.experts * 2 * 1024 * 8192
    assert experts == pytest.approx(billions * 1e9, rel=5e-3)
    assert 0 < parameters(model).total - experts < 1.2e9


def test_switch_xxl_needs_the_128_experts_of_the_release() -> None:
    """The paper's table says 64, which gives half of the 395 B that it prints."""
    model = recipe("switch:xxl")
    assert model.moe is not None
    half = dataclasses.replace(model, moe=dataclasses.replace(model.moe, experts=64))
    assert parameters(model).total == pytest.approx(395e9, rel=0.01)
    assert parameters(half).total == pytest.approx(201e9, rel=0.02)


@pytest.mark.parametrize(("size", "total"), [("c", 1_571_308_972_448), ("large", 27.1e9), ("base", 7.42e9)])
def test_switch_lacks_only_the_cross_attention_of_the_encoder_decoder(size: str, total: float) -> None:
    model = recipe(f"switch:{size}")
    assert isinstance(model.attention, GQA)
    inner = model.attention.heads * model.attention.head_dim
    cross = model.layers // 2 * (4 * model.hidden_size * inner + model.hidden_size)
    assert parameters(model).total + cross == pytest.approx(total, rel=2e-3)


@pytest.mark.parametrize(
    ("size", "millions"),
    [("131072-h", 137_577.6), ("65536-h", 68_791), ("4096-h", 4_303.4), ("256", 272.9), ("32", 37.8)],
)
def test_shazeer_has_the_experts_and_gates_of_its_tables(size: str, millions: float) -> None:
    """Printed without embedding and softmax; two LSTM layers of 4 x 1024 x 512 are what is not experts."""
    model = recipe(f"shazeer:{size}")
    assert model.moe is not None
    experts, gates = model.moe.experts * 2 * 512 * 1024, 2 * model.moe.experts * 512
    assert (experts + gates + 2 * 4 * 1024 * 512) / 1e6 == pytest.approx(millions, rel=1e-3)
    ends = 2 * model.vocab_size * 512
    assert 0 < parameters(model).total - ends - experts - gates < 6e6


def test_latent_moe_has_the_expert_layers_of_nemotron_3_super() -> None:
    """88 layers of one part: 40 of experts, 40 of Mamba-2, 8 of attention, each behind one norm."""
    model = recipe("latent-moe:super")
    width, counts = model.hidden_size, parameters(model)
    attention = 2 * width * (32 + 2) * 128
    ends = 2 * model.vocab_size * width + width
    experts = counts.total - ends - model.layers * (attention + 2 * width)
    inner, mixed = 128 * 64, 128 * 64 + 2 * 8 * 128
    mamba = width * (inner + mixed + 128) + mixed * 4 + mixed + 3 * 128 + inner + inner * width
    whole = experts + 40 * mamba + 8 * attention + 88 * width + ends + counts.buffers
    assert whole == 120_668_707_840


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("deepseek-moe:16b", 74.4), ("deepseek-moe:145b", 585.6), ("deepseek-moe:142b", 374.6)],
)
def test_deepseek_moe_costs_the_flops_that_it_prints(name: str, teraflops: float) -> None:
    """Of 4096 tokens, both passes, without the causal mask; so the half-size uses 13.6 B, not 12.2 B."""
    model = recipe(name)
    attention = 12 * model.layers * model.hidden_size * 4096**2
    cost = 6 * parameters(model).active_without_input_embedding * 4096 + attention
    assert cost / 1e12 == pytest.approx(teraflops, rel=0.025)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("llama:deepseek-67b", 194_560),
        ("deepseek-v2:236b", 34_560),
        ("deepseek-v3:671b", 35_136),
        ("deepseek-v2:lite", 15_552),
    ],
)
def test_cached_values_a_token(name: str, values: int) -> None:
    assert values_per_token(recipe(name)) == values


def test_v2_caches_as_much_as_two_and_a_quarter_groups() -> None:
    model = recipe("deepseek-v2")
    width = model.attention.cache_width
    assert width / (2 * 128) == 2.25
    assert f"{1 - values_per_token(model) / values_per_token(recipe('llama:deepseek-67b')):.3f}" == "0.822"


def test_the_sizes_between_paper_and_release_differ_as_decision_0011_says() -> None:
    for name, factor in (("deepseek-v2:236b", 16.0), ("deepseek-v3:671b", 2.5)):
        released, paper = recipe(name), recipe(f"{name}-paper")
        assert scale(released) == factor
        assert scale(paper) == 1.0
        assert parameters(released) == parameters(paper)
        assert released.moe is not None
        assert paper.moe is not None
        router = dataclasses.replace(paper.moe.router, scale=factor)
        balance = released.moe.balance
        assert dataclasses.replace(paper.moe, router=router, balance=balance) == released.moe
    biased, released = (parameters(recipe(f"skywork-moe:{size}")) for size in ("146b-paper", "146b"))
    assert biased.total - released.total == 52 * 16


def scale(model: Model) -> float:
    assert model.moe is not None
    return model.moe.router.scale
