from __future__ import annotations

import re
import subprocess
import sys

import pytest

from consilium.config.io import from_json, from_yaml, to_json, to_yaml
from consilium.config.model import Model
from consilium.config.moe import AlwaysOn
from consilium.config.router import Groups, Raw, TopK
from consilium.errors import ConsiliumError
from consilium.planner.parameters import parameters
from consilium.recipes.catalogue import find, names, parse, recipe, systems
from consilium.recipes.recipe import Recipe

SYSTEMS = [find(name) for name in names()]
MODELS = [(one, size) for one in SYSTEMS for size in one.sizes]
IDS = [f"{one.name}:{size}" for one, size in MODELS]
UNITS = {"M": 10**6, "B": 10**9, "T": 10**12}
ACTIVE_MISPRINTED = {("deepseek-moe", "142b")}
LOSS_WORDS = {"switch": ("loss",), "adaptive": ("loss", "coefficient")}


def test_every_published_system_and_size_is_there() -> None:
    wanted = {
        "llama": ["7b", "13b", "70b", "deepseek-67b"],
        "jacobs": [],
        "dense-moe": [],
        "shazeer": ["4", "32", "256", "256-h", "1024-h", "4096-h", "65536-h", "131072-h"],
        "gshard": ["12.5b", "37b", "50b", "150b", "200b", "600b", "1t"],
        "switch": ["base", "large", "xxl", "c"],
        "hash": ["2b"],
        "olmoe": ["7b"],
        "expert-choice": ["0.1b-64e", "8b-64e"],
        "mixtral": ["8x7b", "8x22b"],
        "llama-moe": ["3.0b-2-16", "3.5b-4-16", "3.5b-2-8", "3.5b-2-14-residual"],
        "deepseek-moe": ["2b", "16b", "142b", "145b"],
        "deepseek-v2": ["236b", "236b-paper", "lite"],
        "deepseek-v3": ["671b", "671b-paper", "1b"],
        "qwen-moe": ["a2.7b", "57b"],
        "qwen3-moe": ["30b", "235b"],
        "nemotron-moe": ["e8g8t8", "e8g1t2"],
        "latent-moe": ["super"],
        "grok-1": ["314b"],
        "skywork-moe": ["146b", "146b-paper"],
        "qwen2": ["0.5b", "1.5b", "7b", "72b"],
        "qwen3": ["0.6b", "1.7b", "4b", "8b", "14b", "32b"],
    }
    assert {f"{name}:{size}" for name, sizes in wanted.items() for size in [*sizes, "tiny"]} <= set(IDS)


@pytest.mark.parametrize("one", SYSTEMS, ids=names())
def test_without_a_size_a_recipe_is_its_largest_published_one(one: Recipe) -> None:
    totals = {size: parameters(one.sizes[size]).total for size in one.published or one.sizes}
    assert one.largest == max(totals, key=lambda size: totals[size])
    assert recipe(one.name) is one.sizes[one.largest]
    assert parse(one.name) == (one, one.largest)


@pytest.mark.parametrize(("one", "size"), MODELS, ids=IDS)
def test_every_size_is_reached_by_name_and_survives_json_and_yaml(one: Recipe, size: str) -> None:
    model = recipe(one.name, size=size)
    assert model == recipe(f"{one.name}:{size}")
    assert model.family == one.name
    assert from_json(Model, to_json(model)) == model
    assert from_yaml(Model, to_yaml(model)) == model


@pytest.mark.parametrize("one", SYSTEMS, ids=names())
def test_every_recipe_has_a_tiny_size_for_a_cpu(one: Recipe) -> None:
    tiny = parameters(one.model("tiny"))
    assert (one.sizes["tiny"].vocab_size, one.sizes["tiny"].hidden_size) == (4096, 192)
    assert tiny.total + tiny.mtp < 10_000_000
    assert "tiny" not in one.published
    assert all(size in one.sizes for size in one.published)


def printed(count: str) -> tuple[float, float]:
    """A printed count such as 16.4B, and half a unit of its last digit."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?([MBT])", count)
    assert match is not None, count
    return float(count[:-1]) * UNITS[match[3]], UNITS[match[3]] / 10 ** len(match[2] or "") / 2


@pytest.mark.parametrize("one", SYSTEMS, ids=names())
def test_published_counts_are_those_of_the_configuration(one: Recipe) -> None:
    """Totals within two per cent or half a unit of the last digit; active counts are also printed cut off."""
    for size, facts in one.published.items():
        value, half_digit = printed(facts.total)
        counts = parameters(one.sizes[size])
        if facts.skeleton == "same":
            assert abs(counts.total - value) <= max(half_digit, 0.02 * value)
        if facts.skeleton == "same" and facts.active and (one.name, size) not in ACTIVE_MISPRINTED:
            value, half_digit = printed(facts.active)
            embedding = one.sizes[size].vocab_size * one.sizes[size].hidden_size
            shown = (counts.active, counts.active_without_input_embedding, counts.active - embedding)
            assert min(abs(count - value) for count in shown) <= max(2 * half_digit, 0.02 * value)


def test_a_misprint_is_told_beside_the_print() -> None:
    for name, size in ACTIVE_MISPRINTED:
        assert "13.6B" in find(name).published[size].note
        assert f"{parameters(find(name).sizes[size]).active / 1e9:.1f}B" == "13.6B"


@pytest.mark.parametrize("one", SYSTEMS, ids=names())
def test_every_recipe_explains_itself(one: Recipe) -> None:
    said = (*one.choices, *one.equations, *one.deviations, *(facts.note for facts in one.published.values()))
    assert len(one.choices) >= 2
    assert len(one.equations) >= 2
    assert len(set(said) - {""}) >= 4
    assert all(text == text.strip() and "\n" not in text and not text.endswith(".") for text in said)
    if one.model().moe is not None:
        assert one.deviations
        assert any(line.startswith("output") or "y = " in line for line in one.equations)


@pytest.mark.parametrize("one", SYSTEMS, ids=names())
def test_losses_that_a_system_has_are_in_its_equations(one: Recipe) -> None:
    moe = one.model().moe
    losses = moe.balance.losses if moe else ()
    equations = " ".join(one.equations)
    assert all(word in equations for loss in losses for word in LOSS_WORDS.get(loss.kind, (loss.kind,))), (
        equations
    )


def test_tiny_sizes_keep_the_choices_of_their_system() -> None:
    for one in SYSTEMS:
        large, tiny = one.model(), one.model("tiny")
        assert type(large.attention) is type(tiny.attention)
        assert (large.norms, large.tied, large.moe_every) == (tiny.norms, tiny.tied, tiny.moe_every) or (
            one.name in {"switch", "qwen2", "qwen3"}
        )
        assert (large.moe is None) == (tiny.moe is None)
        if large.moe is not None and tiny.moe is not None:
            assert large.moe.router.score == tiny.moe.router.score
            assert large.moe.router.weight == tiny.moe.router.weight
            assert large.moe.router.offset == tiny.moe.router.offset
            assert large.moe.router.transforms == tiny.moe.router.transforms
            assert type(large.moe.router.projection) is type(tiny.moe.router.projection)
            assert type(large.moe.router.noise) is type(tiny.moe.router.noise)
            assert (large.moe.latent is None) == (tiny.moe.latent is None)
            assert type(large.moe.shared) is type(tiny.moe.shared)
            assert type(large.moe.admission) is type(tiny.moe.admission)
            assert [type(loss) for loss in large.moe.balance.losses] == [
                type(loss) for loss in tiny.moe.balance.losses
            ]


def test_v2_and_v3_route_differently_where_they_must() -> None:
    v2, v3 = recipe("deepseek-v2").moe, recipe("deepseek-v3").moe
    assert v2 is not None
    assert v3 is not None
    assert v2.router.select == TopK(k=6, groups=Groups(count=8, keep=3, score="max"))
    assert v3.router.select == TopK(k=8, groups=Groups(count=8, keep=4, score="top2_sum"))
    assert (v2.router.scale, v3.router.scale) == (16.0, 2.5)
    assert isinstance(v2.router.weight, Raw)
    assert (v2.router.offset, v3.router.offset) == ("none", "scores")


def test_the_yardstick_has_the_shape_every_benchmark_uses() -> None:
    model = recipe("deepseek-v3:1b")
    assert (model.vocab_size, model.hidden_size, model.layers, model.dense_first) == (32000, 1024, 12, 1)
    assert model.dense is not None
    assert model.dense.width == 4096
    assert model.moe is not None
    assert (model.moe.experts, model.moe.width, model.moe.router.select) == (64, 512, TopK(k=6))
    assert model.moe.shared == AlwaysOn(count=2, width=512)
    assert model.moe.router.scale == 1.0
    assert model.mtp.depth == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("deepsek-v3", "unknown recipe 'deepsek-v3'. Did you mean 'deepseek-v3'?"),
        ("deepseek-v3:671", "deepseek-v3 has no size '671'. Did you mean '671b'?"),
        ("mixtral:", "mixtral has no size ''. Known: 8x22b, 8x7b, tiny."),
        ("", "unknown recipe ''. Known: "),
        ("zzz", "unknown recipe 'zzz'. Known: "),
    ],
)
def test_an_unknown_name_or_size_is_answered_with_the_nearest(text: str, answer: str) -> None:
    with pytest.raises(ConsiliumError, match=re.escape(answer)):
        recipe(text)


def test_a_size_given_twice_is_not_guessed() -> None:
    with pytest.raises(ConsiliumError, match="unknown recipe"):
        recipe("deepseek-v3:1b", size="671b")


def test_systems_come_in_the_order_of_history() -> None:
    years = [one.year for one in systems()]
    assert years == sorted(years)
    assert {one.name for one in systems()} == set(names())


def test_asking_for_one_recipe_imports_no_other() -> None:
    code = (
        "import sys; from consilium.recipes.catalogue import recipe; recipe('deepseek-v3');"
        "print(*sorted(name for name in sys.modules if name.startswith('consilium.recipes.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    parts = ("catalogue", "deepseek_v3", "layout", "recipe")
    assert done.stdout.split() == [f"consilium.recipes.{part}" for part in parts]
