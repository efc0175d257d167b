from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given

from consilium.config.balance import AdaptiveLoss, Balance, SignBias
from consilium.config.model import Model
from consilium.config.moe import Capacity, MoE
from consilium.config.router import (
    ExpertChoice,
    Hash,
    LinearGate,
    Raw,
    Router,
    SampledSecond,
    SoftmaxOfSelected,
    Threshold,
    TopK,
    TopP,
    TwoLevel,
)
from consilium.planner.parameters import parameters
from consilium.planner.plan import plan
from consilium.recipes.catalogue import recipe
from planner.planner_configs import active, models, tensors

# Total and active parameters of the published checkpoints, without MTP modules and selection biases.
EXACT = {
    "deepseek-v3:671b": (671_026_404_352, 37_552_282_624),
    "deepseek-v2:236b": (235_741_434_880, 21_375_800_320),
    "deepseek-v2:lite": (15_706_484_224, 2_661_150_208),
    "mixtral:8x7b": (46_702_792_704, 12_879_925_248),
    "mixtral:8x22b": (140_620_634_112, 39_152_031_744),
    "llama:7b": (6_738_415_616, 6_738_415_616),
}


@pytest.mark.parametrize("name", EXACT)
def test_totals_are_exact(name: str) -> None:
    counts = parameters(recipe(name))
    assert (counts.total, counts.active) == EXACT[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deepseek-v3:671b", "36.626"),
        ("deepseek-v2:236b", "20.852"),
        ("deepseek-v2:lite", "2.451"),
        ("mixtral:8x7b", "12.749"),
        ("mixtral:8x22b", "38.955"),
        ("llama:7b", "6.607"),
    ],
)
def test_active_without_the_input_embedding(name: str, billions: str) -> None:
    assert f"{parameters(recipe(name)).active_without_input_embedding / 1e9:.3f}" == billions


def test_the_yardstick_of_the_benchmarks() -> None:
    counts = parameters(recipe("deepseek-v3:1b"))
    assert f"{counts.total / 1e9:.3f} B" == "1.259 B"
    assert f"{counts.active_without_input_embedding / 1e6:.0f} M" == "223 M"


def test_v3_counts_its_prediction_module_and_its_biases_apart() -> None:
    """Published: 11.5 B without the projection of 2 * 7168 * 7168; 58 layers of 256 biases."""
    counts = parameters(recipe("deepseek-v3"))
    assert f"{(counts.mtp - 2 * 7168 * 7168) / 1e9:.1f} B" == "11.5 B"
    assert counts.buffers == 58 * 256


def test_a_tied_embedding_is_the_head_and_stays_active() -> None:
    counts = parameters(recipe("switch"))
    assert counts.active_without_input_embedding == counts.active


@given(models)
def test_totals_equal_a_list_of_all_tensors(model: Model) -> None:
    counts = parameters(model)
    sizes = {name: math.prod(shape) for name, shape in tensors(model)}
    assert counts.mtp == sum(size for name, size in sizes.items() if name.startswith("mtp."))
    assert counts.total + counts.mtp == sum(sizes.values())


@given(models)
def test_active_counts_every_tensor_but_idle_experts(model: Model) -> None:
    counts = parameters(model)
    used = sum(
        math.prod(active(model, name, shape)) for name, shape in tensors(model) if not name.startswith("mtp.")
    )
    assert counts.active == used
    embedding = 0 if model.tied else model.vocab_size * model.hidden_size
    assert counts.active_without_input_embedding == used - embedding


@given(models)
def test_all_experts_active_means_every_parameter_is(model: Model) -> None:
    if model.moe is None:
        counts = parameters(model)
    else:
        router = Router(projection=LinearGate(), select=TopK(k=model.moe.experts), weight=Raw())
        moe = dataclasses.replace(model.moe, router=router)
        counts = parameters(dataclasses.replace(model, moe=moe))
    assert counts.active == counts.total


def test_each_way_to_select_has_its_number_of_active_experts() -> None:
    expected = {
        TopK(k=3): 3,
        Hash(k=2, vocab_size=7): 2,
        SampledSecond(): 2,
        Threshold(most=5): 5,
        TopP(p=0.5, most=6): 6,
        ExpertChoice(factor=2.5): 2.5,
        ExpertChoice(factor=99.0): 8,
        TwoLevel(groups=4, keep=3, k=2): 6,
    }
    for select, wanted in expected.items():
        router = Router(select=select, weight=SoftmaxOfSelected())
        assert MoE(experts=8, width=4, router=router).active_experts == wanted


def test_saved_buffers_are_counted_a_routing_layer() -> None:
    model = recipe("deepseek-v3:tiny")
    assert model.moe is not None
    routed = sum(model.is_moe(layer) for layer in range(model.layers))
    balance = Balance(losses=(AdaptiveLoss(),), bias=SignBias())
    moe = dataclasses.replace(model.moe, admission=Capacity(factor=1.0), balance=balance)
    changed = dataclasses.replace(model, moe=moe)
    assert parameters(model).buffers == routed * 32
    assert parameters(changed).buffers == routed * (32 + 1)
    assert parameters(recipe("mixtral:tiny")).buffers == 0
    assert parameters(recipe("llama:tiny")).buffers == 0


def test_a_plan_of_every_published_size_agrees_with_its_parts() -> None:
    for name in EXACT:
        planned = plan(recipe(name))
        assert planned.parameters == parameters(recipe(name))
        assert planned.family == name.partition(":")[0]
