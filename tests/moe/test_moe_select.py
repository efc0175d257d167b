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
from consilium.moe.routing.select import Evidence, choose, drawn_table, hash_table
from consilium.moe.types import LayerMode, Override, Routing
from moe.cases import CAUSAL, EXPERTS, SYSTEMS, layer, moe, some_tokens, tokens, vectors
from support import relative_error

TRAINING = LayerMode(training=True)
DRAWN = [[6, 7], [1, 3], [6, 1], [7, 3], [7, 4], [4, 0]]


def route(config: Router, x_TD: Tensor, mode: LayerMode, padding: int = 0) -> Routing:
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
    whole = built(x_TD, every, LayerMode())
    for length in (1, 7, 19):
        part = built(x_TD[:length], some_tokens(every, torch.arange(length)), LayerMode())
        assert torch.equal(part.routing.experts_TK, whole.routing.experts_TK[:length])
        assert torch.equal(part.routing.keep_TK, whole.routing.keep_TK[:length])
        assert relative_error(part.y_TD, whole.y_TD[:length]) < 1e-6


def test_expert_choice_is_not_causal() -> None:
    built, every, x_TD = layer(SYSTEMS["expert choice"]), tokens(20), vectors(20)
    whole = built(x_TD, every, LayerMode()).routing
    part = built(x_TD[:5], some_tokens(every, torch.arange(5)), LayerMode()).routing
    assert not torch.equal(part.keep_TK, whole.keep_TK[:5])


@pytest.mark.parametrize("name", [n for n in SYSTEMS if n in CAUSAL or n == "expert choice"])
def test_routing_follows_a_permutation_of_tokens(name: str) -> None:
    built, every, x_TD = layer(SYSTEMS[name]), tokens(20, padding=3), vectors(20)
    shuffle_T = torch.randperm(20, generator=torch.Generator().manual_seed(5))
    plain = built(x_TD, every, LayerMode())
    moved = built(x_TD[shuffle_T], some_tokens(every, shuffle_T), LayerMode())
    assert torch.equal(moved.routing.keep_TK, plain.routing.keep_TK[shuffle_T])
    assert relative_error(moved.y_TD, plain.y_TD[shuffle_T]) < 1e-6
    assert torch.equal(moved.report.load_E, plain.report.load_E)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 100.0])
@pytest.mark.parametrize("padding", [0, 5, 21])
def test_every_expert_chooses_the_same_number_of_valid_tokens(factor: float, padding: int) -> None:
    routing = route(
        Router(select=ExpertChoice(factor=factor), weight=Raw()), vectors(21), LayerMode(), padding
    )
    valid = 21 - padding
    assert routing.load_E().tolist() == [min(valid, math.ceil(factor * valid / EXPERTS))] * EXPERTS
    assert not routing.keep_TK[valid:].any()


def test_an_expert_chooses_no_token_more_for_a_rounding_error() -> None:
    """1.1 * 100 / 11 is 10, but its float is a little more."""
    values_TE = vectors(100, hidden=11)
    evidence = Evidence(values_TE, values_TE, values_TE)
    choice = choose(ExpertChoice(factor=1.1), evidence, tokens(100), LayerMode())
    assert choice.wanted_TK.sum() == 10 * 11


def test_the_second_expert_is_used_with_probability_twice_its_gate() -> None:
    mode = LayerMode(training=True, generator=torch.Generator().manual_seed(0))
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
    assert route(Router(select=SampledSecond()), vectors(50), LayerMode()).keep_TK.all()
    assert not route(Router(select=SampledSecond()), vectors(50), TRAINING).keep_TK.all()


@given(p=st.floats(0.05, 1.0), seed=st.integers(0, 10**6))
def test_top_p_takes_the_smallest_set_that_reaches_p(p: float, seed: int) -> None:
    routing = route(Router(select=TopP(p=p, most=EXPERTS), weight=Raw()), vectors(8, seed), LayerMode())
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


def hashed(seed: int, token: int, k: int, experts: int) -> list[int]:
    """The same in plain integers: splitmix64's finaliser, then the r-th expert that is still free."""

    def mixed(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    state, free, taken = (mixed(seed % 2**64) + token + 1) % 2**64, list(range(experts)), []
    state = mixed(state)
    for j in range(k):
        state = mixed((state + j + 1) % 2**64)
        signed = state - 2**64 if state >= 2**63 else state
        taken.append(free.pop(signed % len(free)))
    return taken


@given(seed=st.integers(-(2**62), 2**62), k=st.integers(1, 5), experts=st.integers(1, 9))
def test_the_hash_table_equals_plain_integers(seed: int, k: int, experts: int) -> None:
    k = min(k, experts)
    table_VK = hash_table(Hash(k=k, vocab_size=7, seed=seed), experts)
    assert table_VK.tolist() == [hashed(seed, token, k, experts) for token in range(7)]


def test_the_hash_table_is_the_same_for_ever() -> None:
    """A golden row: weights saved without their table would be worth nothing if it moved."""
    config = Hash(k=2, vocab_size=6, seed=3)
    assert hash_table(config, EXPERTS).tolist() == [[1, 2], [3, 4], [7, 4], [0, 7], [5, 4], [7, 5]]
    # Tables of before they were saved, as torch's generator drew them.
    assert drawn_table(config, EXPERTS).tolist() == DRAWN


@pytest.mark.parametrize("name", SYSTEMS)
def test_muted_experts_are_never_used(name: str) -> None:
    built, x_TD = layer(SYSTEMS[name]), vectors(30)
    mute_TE = torch.zeros(1, EXPERTS, dtype=torch.bool)
    mute_TE[0, [1, 4]] = True
    result = built(x_TD, tokens(30), LayerMode(override=Override(mute_TE=mute_TE)))
    assert not result.report.load_E[[1, 4]].any()
    assert int(result.report.load_E.sum()) > 0


def test_muting_works_token_by_token_and_can_leave_nothing() -> None:
    mute_TE = torch.zeros(3, EXPERTS, dtype=torch.bool)
    mute_TE[1] = True
    mute_TE[2, 1:] = True
    groups = Groups(count=4, keep=2, score="max")
    config = Router(score=Sigmoid(), select=TopK(k=3, groups=groups), weight=Normalised())
    routing = route(config, vectors(3), LayerMode(override=Override(mute_TE=mute_TE)))
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
    routing = route(config, vectors(6, seed), LayerMode(override=Override(mute_TE=mute_TE)))
    open_TE = routing.scores_TE.masked_fill(mute_TE, -1)
    best_TG = open_TE.view(6, 4, 2).amax(dim=2).sort(dim=1, descending=True, stable=True).indices[:, :2]
    for t, best in enumerate(best_TG.tolist()):
        inside = [e for e in range(EXPERTS) if e // 2 in best and open_TE[t, e] >= 0]
        assert sorted(routing.experts_TK[t][routing.keep_TK[t]].tolist()) == inside


def open_groups(values: list[float], size: int, keep: int) -> set[int]:
    """DeepSeek-V3's groups where None of the experts of a group may be left, one, or more, written out."""
    groups = [values[g : g + size] for g in range(0, len(values), size)]
    ranked = [sorted((v for v in group if v != -math.inf), reverse=True) for group in groups]
    if any(len(left) == 1 for left in ranked):
        worth = [left[0] if left else -math.inf for left in ranked]
    else:
        worth = [left[0] + left[1] if left else -math.inf for left in ranked]
    return set(sorted(range(len(groups)), key=lambda g: (-worth[g], g))[:keep])


@given(
    values=st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 0.5, 9.0]), min_size=12, max_size=12),
    muted=st.sets(st.integers(0, 11), max_size=12),
    keep=st.integers(1, 4),
    k=st.integers(1, 3),
)
def test_muting_inside_groups_leaves_the_best_expert_first(
    values: list[float], muted: set[int], keep: int, k: int
) -> None:
    """With ties and negative biases, against plain loops; where one is alone, none goes before the best."""
    values_TE = torch.tensor([values])
    mute_TE = torch.zeros(1, 12, dtype=torch.bool)
    mute_TE[0, list(muted)] = True
    select = TopK(k=k, groups=Groups(count=4, keep=keep, score="top2_sum"))
    mode = LayerMode(override=Override(mute_TE=mute_TE))
    choice = choose(select, Evidence(values_TE, values_TE, values_TE), tokens(1), mode)
    left = [-math.inf if e in muted else value for e, value in enumerate(values)]
    opened = open_groups(left, 3, keep)
    inside = [e for e in range(12) if e // 3 in opened and left[e] != -math.inf]
    wanted = sorted(inside, key=lambda e: (-left[e], e))[:k]
    assert choice.experts_TK[choice.wanted_TK].tolist() == wanted
    if any(sum(e not in muted for e in range(g, g + 3)) == 1 for g in range(0, 12, 3)):
        assert left[wanted[0]] == max(left)


def test_an_expert_of_logit_nine_alone_in_its_group_goes_before_pairs_of_logit_zero() -> None:
    """sigmoid(9) is less than twice sigmoid(0): the sum of two would have it wait."""
    logits_TE = torch.zeros(1, EXPERTS)
    logits_TE[0, 7] = 9.0
    mute_TE = torch.zeros(1, EXPERTS, dtype=torch.bool)
    mute_TE[0, 6] = True
    select = TopK(k=1, groups=Groups(count=4, keep=1, score="top2_sum"))
    values_TE = torch.sigmoid(logits_TE)
    mode = LayerMode(override=Override(mute_TE=mute_TE))
    assert choose(select, Evidence(values_TE, values_TE, values_TE), tokens(1), mode).experts_TK.tolist() == [
        [7]
    ]


@pytest.mark.parametrize("weight", [Normalised(), SoftmaxOfSelected(), Raw()], ids=lambda rule: rule.kind)
def test_a_budget_of_k_routes_as_a_router_of_that_k(weight: Normalised | SoftmaxOfSelected | Raw) -> None:
    x_TD = vectors(12)
    k_T = torch.arange(12) % 4 + 1
    wide = route(Router(select=TopK(k=4), weight=weight), x_TD, LayerMode(override=Override(k_T=k_T)))
    for k in (2, 3, 4):
        narrow = route(Router(select=TopK(k=k), weight=weight), x_TD, LayerMode())
        rows = k_T == k
        assert torch.equal(wide.experts_TK[rows][:, :k], narrow.experts_TK[rows])
        assert relative_error(wide.weights_TK[rows][:, :k], narrow.weights_TK[rows]) < 1e-6
        assert not wide.keep_TK[rows][:, k:].any()


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("garbage", [0.0, 1e30])
def test_padding_takes_part_in_nothing(name: str, garbage: float) -> None:
    built, x_TD, mode = layer(SYSTEMS[name]), vectors(20), LayerMode()
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
        Router(select=Hash(vocab_size=50), weight=Uniform(), scale=0.5), vectors(9), LayerMode(), padding=2
    )
    assert routing.weights_TK.flatten().tolist() == [0.5] * 7 + [0.0] * 2
