"""Parts that are right alone and wrong together are refused where they meet, with what to do."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from consilium.config.attention import GQA
from consilium.config.balance import (
    AdaptiveLoss,
    Balance,
    CommunicationLoss,
    LoadLoss,
    QuantileBias,
    SignBias,
    SwitchLoss,
)
from consilium.config.feed_forward import FeedForward
from consilium.config.model import MTP, Model
from consilium.config.moe import Admission, Capacity, DeviceCapacity, Dropless, MoE
from consilium.config.router import (
    ClampedSum,
    ExpertChoice,
    Groups,
    Hash,
    LearnedNoise,
    NoGate,
    Normalised,
    Raw,
    Router,
    SampledSecond,
    Select,
    Sigmoid,
    Sinkhorn,
    SoftmaxOfSelected,
    Standardise,
    Threshold,
    TopK,
    TopP,
    TwoLevel,
    Uniform,
    Weight,
)
from consilium.errors import ConsiliumError
from consilium.recipes.catalogue import recipe

OF_SELECTED = SoftmaxOfSelected()
ONE: list[Select] = [TopK(k=1), Threshold(most=1), TopP(p=0.5, most=1), Hash(vocab_size=9)]
SHARING: list[Weight] = [Normalised(), ClampedSum(minimum=0.1), OF_SELECTED]


def moe(router: Router, *losses: Any, admission: Admission | None = None) -> MoE:
    balance = Balance(losses=losses)
    return MoE(experts=8, width=4, router=router, balance=balance, admission=admission or Dropless())


@pytest.mark.parametrize("weight", SHARING, ids=lambda weight: weight.kind)
@pytest.mark.parametrize("select", ONE, ids=lambda select: select.kind)
def test_a_single_expert_whose_weight_is_always_one_is_refused(select: Select, weight: Weight) -> None:
    with pytest.raises(ConsiliumError, match="of a single expert is 1 and gives the router no gradient"):
        Router(select=select, weight=weight)
    assert Router(select=select, weight=Raw()).most_active == 1


def test_two_levels_of_one_choice_each_are_refused_and_one_choice_in_two_groups_is_not() -> None:
    with pytest.raises(ConsiliumError, match="gives the router no gradient"):
        Router(select=TwoLevel(groups=4, keep=1, k=1), weight=OF_SELECTED)
    assert Router(select=TwoLevel(groups=4, keep=2, k=1), weight=OF_SELECTED).most_active == 2


CHOICES: list[Select] = [
    TopK(k=2, groups=Groups(count=2, keep=1, score="max")),
    SampledSecond(),
    Threshold(most=3),
    TopP(p=0.5, most=3),
    ExpertChoice(),
    Hash(k=2, vocab_size=9),
    Sinkhorn(k=2),
]


@pytest.mark.parametrize(
    "router",
    [
        *(Router(noise=LearnedNoise(), select=select, weight=Raw()) for select in CHOICES),
        Router(noise=LearnedNoise(), select=TopK(k=2), score=Sigmoid(), offset="scores"),
        Router(noise=LearnedNoise(), select=TopK(k=2), transforms=(Standardise(),)),
        Router(select=TopK(k=2)),
    ],
    ids=lambda router: f"{router.select.kind} {router.offset} {len(router.transforms)} {router.noise.kind}",
)
def test_the_load_loss_is_refused_where_its_chance_is_not_that_of_being_selected(router: Router) -> None:
    with pytest.raises(
        ConsiliumError, match=r"the load loss needs moe\.router\.noise of kind 'learned' and a"
    ):
        moe(router, LoadLoss())


@pytest.mark.parametrize("select", [TopK(k=2), TwoLevel(groups=4)], ids=lambda select: select.kind)
def test_the_load_loss_is_for_the_highest_noisy_logits(select: Select) -> None:
    router = Router(noise=LearnedNoise(), select=select, weight=OF_SELECTED)
    assert moe(router, LoadLoss()).balance.losses == (LoadLoss(),)


def test_the_adaptive_loss_is_refused_where_nothing_drops() -> None:
    plain = Router(select=TopK(k=2))
    for router, admission in [
        (plain, Dropless()),
        (Router(select=ExpertChoice(), weight=Raw()), Capacity(factor=1.0)),
    ]:
        with pytest.raises(ConsiliumError, match=r"set moe\.admission to kind 'capacity'"):
            moe(router, AdaptiveLoss(), admission=admission)
    for admission in (Capacity(factor=1.25), DeviceCapacity(devices=2)):
        assert moe(plain, AdaptiveLoss(), admission=admission).admission == admission


def test_a_layer_has_one_adaptive_coefficient() -> None:
    with pytest.raises(ConsiliumError, match="two adaptive losses"):
        Balance(losses=(AdaptiveLoss(), AdaptiveLoss(momentum=0.5)))


@pytest.mark.parametrize(
    "select",
    [TopK(k=2, groups=Groups(count=2, keep=1, score="max")), TopK(k=8), SampledSecond(), Threshold(most=3)],
    ids=repr,
)
def test_quantile_balancing_is_for_the_best_of_all_experts(select: Select) -> None:
    router = Router(select=select, offset="scores", weight=Raw())
    with pytest.raises(ConsiliumError, match=r"needs moe\.router\.select 'top_k' without groups"):
        MoE(experts=8, width=4, router=router, balance=Balance(bias=QuantileBias()))


def test_a_layer_counts_devices_over_a_step_for_one_number_of_them() -> None:
    both = [CommunicationLoss(devices=d, most=2, scope="step") for d in (2, 4)]
    with pytest.raises(ConsiliumError, match=r"several numbers of devices, \[2, 4\]"):
        Balance(losses=tuple(both))
    narrow = CommunicationLoss(devices=4, most=2)
    assert Balance(losses=(both[0], narrow)).counted_devices == 2
    assert Balance(losses=(narrow,)).counted_devices is None


@pytest.mark.parametrize(
    "select", [Hash(k=2, vocab_size=9), ExpertChoice(), Sinkhorn(k=2)], ids=lambda select: select.kind
)
def test_no_bias_where_loads_are_fixed_without_it(select: Select) -> None:
    with pytest.raises(ConsiliumError, match=f"select '{select.kind}' leaves a bias nothing to balance"):
        Router(select=select, weight=Raw(), offset="scores")
    router = Router(select=select, weight=Raw())
    with pytest.raises(ConsiliumError, match="offset 'none' never reads"):
        MoE(experts=8, width=4, router=router, balance=Balance(bias=SignBias()))


def test_no_loss_where_no_gate_could_follow_it() -> None:
    router = Router(projection=NoGate(), select=Hash(vocab_size=9), weight=Uniform())
    with pytest.raises(ConsiliumError, match="projection 'none' has none; remove the losses"):
        MoE(experts=8, width=4, router=router, balance=Balance(losses=(SwitchLoss(),)))


@pytest.mark.parametrize("size", [0, -1, 2**48, 10**400])
def test_a_size_is_an_ordinary_number(size: int) -> None:
    with pytest.raises(ConsiliumError, match="head_dim"):
        GQA(heads=1, kv_heads=1, head_dim=size)


def test_a_token_is_sent_to_no_more_devices_than_there_are() -> None:
    with pytest.raises(ConsiliumError, match="at most 3 devices a token has only 2 devices; lower most"):
        CommunicationLoss(devices=2, most=3)
    assert CommunicationLoss(devices=3, most=3).most == 3


def test_a_hash_table_knows_every_token() -> None:
    model = recipe("hash:tiny")
    with pytest.raises(ConsiliumError, match="knows 4096 tokens and the vocabulary has 8192"):
        dataclasses.replace(model, vocab_size=8192)
    assert dataclasses.replace(model, vocab_size=300).vocab_size == 300


def test_rows_of_gates_are_those_of_each_level_and_of_its_noise() -> None:
    levels = TwoLevel(groups=4)
    assert Router(select=TopK(k=2)).gate_rows(8) == 8
    assert Router(select=TopK(k=2), noise=LearnedNoise()).gate_rows(8) == 16
    assert Router(select=levels, weight=OF_SELECTED, noise=LearnedNoise()).gate_rows(8) == 2 * (8 + 4)
    assert Router(projection=NoGate(), select=Hash(vocab_size=9), weight=Uniform()).gate_rows(8) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_layers": (0,)}, "without a window every layer does"),
        ({"window": 4, "full_layers": (1, 0)}, r"full_layers \[1, 0\] are not in rising order, each once"),
        ({"window": 4, "full_layers": (1, 1)}, "are not in rising order, each once"),
        ({"window": 4, "full_layers": (-1,)}, "full_layers"),
        ({"window": 0}, "window"),
    ],
)
def test_a_window_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConsiliumError, match=message):
        GQA(heads=2, kv_heads=1, head_dim=4, **changes)


def test_layers_that_a_model_does_not_have_are_refused() -> None:
    attention = GQA(heads=2, kv_heads=1, head_dim=4, window=4, full_layers=(1, 3))
    shape = {
        "family": "x",
        "vocab_size": 9,
        "hidden_size": 8,
        "attention": attention,
        "dense": FeedForward(width=4),
    }
    with pytest.raises(
        ConsiliumError, match="full_layers names layer 3, and the model has 3, counted from 0"
    ):
        Model(**shape, layers=3)
    with pytest.raises(ConsiliumError, match="full_layers names layer 3"):
        Model(**shape, layers=3, mtp=MTP(depth=1))
    assert Model(**shape, layers=5).windowed_layers == (0, 2, 4)
