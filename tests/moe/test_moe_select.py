"""Selectors, overrides, causality and padding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.config.router import (
    ExpertChoice,
    Groups,
    Hash,
    Normalised,
    Raw,
    Router,
    SampledSecond,
    Sigmoid,
    SoftmaxOfSelected,
    TopK,
    TopP,
    Uniform,
)
from consilium.moe.ordering import highest, place_within
from consilium.moe.routing.select import Evidence, choose, hash_table
from consilium.moe.types import Mode, Override, Routing
from moe.cases import CAUSAL, EXPERTS, SYSTEMS, layer, moe, some_tokens, tokens, vectors
from support import relative_error

TRAINING = Mode(training=True)


def route(config: Router, x_TD: Tensor, mode: Mode, padding: int = 0) -> Routing:
    count = x_TD.shape[0]
    built = layer(moe(config))
    return built.router(x_TD, built.balance.bias_E, tokens(count, padding=padding), mode)


@given(st.data())
def test_highest_is_a_stable_sort_with_ties_to_the_lowest(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 9))
    k = data.draw(st.integers(0, columns))
    numbers = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 1.0, math.inf])
    table = data.draw(
        st.lists(st.lists(numbers, min_size=columns, max_size=columns), min_size=rows, max_size=rows)
    )
    values = torch.tensor(table, dtype=torch.float32).view(rows, columns)
    expected = [sorted(range(columns), key=lambda c, row=row: (-row[c], c))[:k] for row in table]
    assert highest(values, k).tolist() == expected


@given(st.lists(st.integers(0, 4), max_size=30))
def test_places_count_earlier_members(groups: list[int]) -> None:
    expected = [groups[:i].count(group) for i, group in enumerate(groups)]
    assert place_within(torch.tensor(groups, dtype=torch.int64)).tolist() == expected


@pytest.mark.parametrize("name", CAUSAL)
def test_the_future_changes_nothing(name: str) -> None:
    built, every, x_TD = layer(SYSTEMS[name]), tokens(20), vectors(20)
    whole = built(x_TD, every, Mode())
    for length in (1, 7, 19):
        part = built(x_TD[:length], some_tokens(every, torch.arange(length)), Mode())
        assert torch.equal(part.routing.experts_TK, whole.routing.experts_TK[:length])
        assert torch.equal(part.routing.keep_TK, whole.routing.keep_TK[:length])
        assert relative_error(part.y_TD, whole.y_TD[:length]) < 1e-6


def test_expert_choice_is_not_causal() -> None:
    built, every, x_TD = layer(SYSTEMS["expert choice"]), tokens(20), vectors(20)
    whole = built(x_TD, every, Mode()).routing
    part = built(x_TD[:5], some_tokens(every, torch.arange(5)), Mode()).routing
    assert not torch.equal(part.keep_TK, whole.keep_TK[:5])


@pytest.mark.parametrize("name", [n for n in SYSTEMS if n in CAUSAL or n == "expert choice"])
def test_routing_follows_a_permutation_of_tokens(name: str) -> None:
    built, every, x_TD = layer(SYSTEMS[name]), tokens(20, padding=3), vectors(20)
    shuffle_T = torch.randperm(20, generator=torch.Generator().manual_seed(5))
    plain = built(x_TD, every, Mode())
    moved = built(x_TD[shuffle_T], some_tokens(every, shuffle_T), Mode())
    assert torch.equal(moved.routing.keep_TK, plain.routing.keep_TK[shuffle_T])
    assert relative_error(moved.y_TD, plain.y_TD[shuffle_T]) < 1e-6
    assert torch.equal(moved.report.load_E, plain.report.load_E)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 100.0])
@pytest.mark.parametrize("padding", [0, 5, 21])
def test_every_expert_chooses_the_same_number_of_valid_tokens(factor: float, padding: int) -> None:
    routing = route(Router(select=ExpertChoice(factor=factor), weight=Raw()), vectors(21), Mode(), padding)
    valid = 21 - padding
    assert routing.load_E().tolist() == [min(valid, math.ceil(factor * valid / EXPERTS))] * EXPERTS
    assert not routing.keep_TK[valid:].any()


def test_an_expert_chooses_no_token_more_for_a_rounding_error() -> None:
    """1.1 * 100 / 11 is 10, but its float is a little more."""
    values_TE = vectors(100, hidden=11)
    evidence = Evidence(values_TE, values_TE)
    choice = choose(ExpertChoice(factor=1.1), evidence, tokens(100), Mode())
    assert choice.keep_TK.sum() == 10 * 11


def test_the_second_expert_is_used_with_probability_twice_its_gate() -> None:
    mode = Mode(training=True, generator=torch.Generator().manual_seed(0))
    routing = route(Router(select=SampledSecond()), 0.4 * vectors(1).expand(20_000, -1), mode)
    first, second = routing.scores_TE[0].detach().topk(2).values.tolist()
    gate = second / (first + second)
    assert 0.1 < gate < 0.4
    assert routing.keep_TK[:, 0].all()
    assert abs(float(routing.keep_TK[:, 1].float().mean()) - 2 * gate) < 0.02
    assert not routing.weights_TK[~routing.keep_TK].any()
    # GShard normalises before the draw: a first choice left alone keeps a weight below one.
    assert relative_error(routing.weights_TK[:, 0], torch.full((20_000,), 1 - gate)) < 1e-5


def test_evaluation_always_uses_the_second_expert() -> None:
    assert route(Router(select=SampledSecond()), vectors(50), Mode()).keep_TK.all()
    assert not route(Router(select=SampledSecond()), vectors(50), TRAINING).keep_TK.all()


@given(p=st.floats(0.05, 1.0), seed=st.integers(0, 10**6))
def test_top_p_takes_the_smallest_set_that_reaches_p(p: float, seed: int) -> None:
    routing = route(Router(select=TopP(p=p, most=EXPERTS), weight=Raw()), vectors(8, seed), Mode())
    chosen_TK = routing.scores_TE.detach().gather(1, routing.experts_TK).double()
    for row, used in zip(chosen_TK.tolist(), routing.keep_TK.tolist(), strict=True):
        count = sum(used)
        assert used == [True] * count + [False] * (EXPERTS - count)
        assert sum(row[:count]) >= p - 1e-6 or count == EXPERTS
        assert sum(row[: count - 1]) < p + 1e-6


def test_hash_experts_are_fixed_distinct_and_spread() -> None:
    config = Hash(k=2, vocab_size=4000, seed=3)
    table_VK = hash_table(config, EXPERTS)
    assert torch.equal(table_VK, hash_table(config, EXPERTS))
    assert not torch.equal(table_VK, hash_table(replace(config, seed=4), EXPERTS))
    assert (table_VK[:, 0] != table_VK[:, 1]).all()
    counts = torch.bincount(table_VK.flatten(), minlength=EXPERTS)
    assert float(counts.max() / counts.min()) < 1.2


@pytest.mark.parametrize("name", SYSTEMS)
def test_muted_experts_are_never_used(name: str) -> None:
    built, x_TD = layer(SYSTEMS[name]), vectors(30)
    mute_TE = torch.zeros(1, EXPERTS, dtype=torch.bool)
    mute_TE[0, [1, 4]] = True
    result = built(x_TD, tokens(30), Mode(override=Override(mute_TE=mute_TE)))
    assert not result.report.load_E[[1, 4]].any()
    assert int(result.report.load_E.sum()) > 0


def test_muting_works_token_by_token_and_can_leave_nothing() -> None:
    mute_TE = torch.zeros(3, EXPERTS, dtype=torch.bool)
    mute_TE[1] = True
    mute_TE[2, 1:] = True
    groups = Groups(count=4, keep=2, score="max")
    config = Router(score=Sigmoid(), select=TopK(k=3, groups=groups), weight=Normalised())
    routing = route(config, vectors(3), Mode(override=Override(mute_TE=mute_TE)))
    assert routing.keep_TK.sum(dim=1).tolist() == [3, 0, 1]
    assert routing.experts_TK[2, 0] == 0
    assert relative_error(routing.weights_TK.sum(dim=1), torch.tensor([1.0, 0, 1])) < 1e-6


@given(seed=st.integers(0, 10**6), data=st.data())
def test_muting_opens_no_closed_group(seed: int, data: st.DataObject) -> None:
    """Where it leaves fewer than k in the kept groups, fewer are used: none comes from elsewhere."""
    muted = data.draw(st.lists(st.integers(0, EXPERTS - 1), max_size=5, unique=True))
    mute_TE = torch.zeros(1, EXPERTS, dtype=torch.bool)
    mute_TE[0, muted] = True
    groups = Groups(count=4, keep=2, score="max")
    config = Router(select=TopK(k=4, groups=groups), weight=Raw())
    routing = route(config, vectors(6, seed), Mode(override=Override(mute_TE=mute_TE)))
    open_TE = routing.scores_TE.masked_fill(mute_TE, -1)
    best_TG = open_TE.view(6, 4, 2).amax(dim=2).sort(dim=1, descending=True, stable=True).indices[:, :2]
    for t, best in enumerate(best_TG.tolist()):
        inside = [e for e in range(EXPERTS) if e // 2 in best and open_TE[t, e] >= 0]
        assert sorted(routing.experts_TK[t][routing.keep_TK[t]].tolist()) == inside


@pytest.mark.parametrize("weight", [Normalised(), SoftmaxOfSelected(), Raw()], ids=lambda rule: rule.kind)
def test_a_budget_of_k_routes_as_a_router_of_that_k(weight: Normalised | SoftmaxOfSelected | Raw) -> None:
    x_TD = vectors(12)
    k_T = torch.arange(12) % 4 + 1
    wide = route(Router(select=TopK(k=4), weight=weight), x_TD, Mode(override=Override(k_T=k_T)))
    for k in (2, 3, 4):
        narrow = route(Router(select=TopK(k=k), weight=weight), x_TD, Mode())
        rows = k_T == k
        assert torch.equal(wide.experts_TK[rows][:, :k], narrow.experts_TK[rows])
        assert relative_error(wide.weights_TK[rows][:, :k], narrow.weights_TK[rows]) < 1e-6
        assert not wide.keep_TK[rows][:, k:].any()


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("garbage", [0.0, 1e30])
def test_padding_takes_part_in_nothing(name: str, garbage: float) -> None:
    built, x_TD, mode = layer(SYSTEMS[name]), vectors(20), Mode()
    padded_TD = torch.cat([x_TD, torch.full_like(x_TD[:6], garbage)])
    every = tokens(26, sequences=1, padding=6)
    plain = built(x_TD, some_tokens(every, torch.arange(20)), mode)
    padded = built(padded_TD, every, mode)
    assert relative_error(padded.y_TD[:20], plain.y_TD) < 1e-6
    assert not padded.routing.keep_TK[20:].any()
    assert not padded.routing.weights_TK[20:].any()
    assert int(padded.report.tokens) == 20
    assert torch.equal(padded.report.load_E, plain.report.load_E)
    assert torch.equal(padded.report.wanted_E, plain.report.wanted_E)
    assert relative_error(padded.report.entropy, plain.report.entropy) < 1e-6


def test_uniform_weights_ignore_the_gate() -> None:
    routing = route(
        Router(select=Hash(vocab_size=50), weight=Uniform(), scale=0.5), vectors(9), Mode(), padding=2
    )
    assert routing.weights_TK.flatten().tolist() == [0.5] * 7 + [0.0] * 2
