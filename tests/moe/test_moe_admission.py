"""Admission: capacity and device budgets, by plain counting."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.config.moe import Capacity, DeviceCapacity, Dropless
from consilium.moe.admission import admit, exempt
from consilium.moe.ordering import capacity
from consilium.moe.types import LayerMode, Routing, Tokens
from moe.cases import decision, some_tokens, tokens

TRAINING = LayerMode(training=True)


def routing(count: int, experts: int, k: int, seed: int, padding: int = 0, *, ties: bool = False) -> Routing:
    """A skewed decision: low experts are wanted more, some choices are not kept."""
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(count, experts, generator=generator) + torch.linspace(0.5, 0, experts)
    if ties:
        scores_TE = scores_TE.mul(3).round()
    experts_TK = scores_TE.sort(dim=1, descending=True, stable=True).indices[:, :k]
    keep_TK = torch.rand(count, k, generator=generator) < 0.9
    keep_TK[count - padding :] = False
    return decision(scores_TE, experts_TK, keep_TK)


SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6)).filter(
    lambda shape: shape[2] <= shape[1]
)


@given(SHAPES, st.sampled_from([0.25, 0.5, 1.0, 1.25, 2.0]), st.sampled_from(["position", "probability"]))
def test_capacity_is_never_exceeded_and_drops_exactly_the_excess(
    shape: tuple[int, int, int, int], factor: float, by: str
) -> None:
    count, experts, k, seed = shape
    padding = seed % (count + 1)
    wanted = routing(count, experts, k, seed, padding)
    admitted = admit(wanted, tokens(count, padding=padding), Capacity(factor=factor, by=by), TRAINING)
    limit = math.ceil(Fraction(factor) * (count - padding) * k / experts)
    before, after = wanted.load_E().tolist(), admitted.load_E().tolist()
    assert after == [min(load, limit) for load in before]
    assert not (admitted.keep_TK & ~wanted.keep_TK).any()
    assert admitted.weights_TK is wanted.weights_TK


def test_a_second_choice_that_the_draw_rejected_has_taken_its_place() -> None:
    """GShard algorithm 1 counts it (line 22): of three that want 1 second, the last comes too late."""
    experts_TK = torch.tensor([[0, 1], [2, 1], [3, 1], [2, 0]])
    every_TK = torch.ones(4, 2, dtype=torch.bool)
    wanted_TK = every_TK.clone()
    wanted_TK[1, 1] = False
    drawn = replace(
        decision(torch.rand(4, 4), experts_TK, wanted_TK), considered_TK=every_TK, wanted_TK=wanted_TK
    )
    admitted = admit(drawn, tokens(4), Capacity(factor=1.0), TRAINING)
    assert admitted.keep_TK.tolist() == [[True, True], [True, False], [True, False], [True, True]]
    assert admitted.wanted_TK is wanted_TK


@given(SHAPES, st.sampled_from(["position", "probability"]))
def test_more_capacity_keeps_all_that_less_kept(shape: tuple[int, int, int, int], by: str) -> None:
    count, experts, k, seed = shape
    wanted = routing(count, experts, k, seed)
    kept = [
        admit(wanted, tokens(count), Capacity(factor=f, by=by), TRAINING).keep_TK
        for f in (0.5, 1.0, 1.5, 8.0)
    ]
    for less, more in pairwise(kept):
        assert not (less & ~more).any()
    assert torch.equal(kept[-1], wanted.keep_TK)


@given(SHAPES)
def test_position_admits_first_choices_in_token_order_then_second(shape: tuple[int, int, int, int]) -> None:
    count, experts, k, seed = shape
    wanted = routing(count, experts, k, seed)
    limit = capacity(0.7, count, k, experts)
    load, expected = [0] * experts, torch.zeros_like(wanted.keep_TK)
    for rank in range(k):
        for t in range(count):
            e = int(wanted.experts_TK[t, rank])
            if wanted.keep_TK[t, rank] and load[e] < limit:
                load[e] += 1
                expected[t, rank] = True
    admitted = admit(wanted, tokens(count), Capacity(factor=0.7), TRAINING)
    assert torch.equal(admitted.keep_TK, expected)


@given(shape=SHAPES, ties=st.booleans())
def test_probability_admits_the_highest_scores_and_ties_by_rank_and_token(
    *, shape: tuple[int, int, int, int], ties: bool
) -> None:
    count, experts, k, seed = shape
    wanted = routing(count, experts, k, seed, ties=ties)
    limit = capacity(0.7, count, k, experts)
    copies = [(r, t) for r in range(k) for t in range(count) if wanted.keep_TK[t, r]]
    copies.sort(key=lambda c: -wanted.scores_TE[c[1], wanted.experts_TK[c[1], c[0]]].item())
    load, expected = [0] * experts, torch.zeros_like(wanted.keep_TK)
    for rank, t in copies:
        e = int(wanted.experts_TK[t, rank])
        if load[e] < limit:
            load[e] += 1
            expected[t, rank] = True
    admitted = admit(wanted, tokens(count), Capacity(factor=0.7, by="probability"), TRAINING)
    assert torch.equal(admitted.keep_TK, expected)


@given(
    SHAPES,
    st.sampled_from([0.5, 1.0, 1.25]),
    st.integers(1, 9),
    st.sampled_from(["position", "probability"]),
)
def test_local_groups_admit_as_if_each_came_alone(
    shape: tuple[int, int, int, int], factor: float, size: int, by: str
) -> None:
    """Runs of valid tokens; padding between them shifts nothing, and the last run may be short."""
    count, experts, k, seed = shape
    wanted = routing(count, experts, k, seed)
    valid_T = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.7
    wanted = decision(wanted.scores_TE, wanted.experts_TK, wanted.keep_TK & valid_T[:, None])
    every = replace(tokens(count), valid_T=valid_T)
    whole = Capacity(factor=factor, by=by)
    grouped = admit(wanted, every, replace(whole, group_tokens=size), TRAINING)
    assert not grouped.keep_TK[~valid_T].any()
    for part_N in valid_T.nonzero()[:, 0].split(size):
        alone = admit(rows(wanted, part_N), some_tokens(every, part_N), whole, TRAINING)
        assert torch.equal(grouped.keep_TK[part_N], alone.keep_TK)


def rows(routing: Routing, index_N: torch.Tensor) -> Routing:
    parts = {field.name: getattr(routing, field.name) for field in fields(Routing)}
    return Routing(
        **{
            name: value[index_N] if isinstance(value, torch.Tensor) else value
            for name, value in parts.items()
        }
    )


def test_one_group_of_all_tokens_is_no_group() -> None:
    wanted, every = routing(30, 4, 2, seed=3, padding=5), tokens(30, padding=5)
    plain = admit(wanted, every, Capacity(factor=0.5), TRAINING).keep_TK
    assert not torch.equal(plain, wanted.keep_TK)
    assert torch.equal(plain, admit(wanted, every, Capacity(factor=0.5, group_tokens=25), TRAINING).keep_TK)
    assert not torch.equal(
        plain, admit(wanted, every, Capacity(factor=0.5, group_tokens=7), TRAINING).keep_TK
    )


def test_capacity_does_not_round_a_whole_number_up() -> None:
    for numerator in range(1, 400):
        factor = numerator / 100
        exact = math.ceil(Fraction(numerator, 100) * 4096 * 6 / 64)
        assert capacity(factor, 4096, 6, 64) == exact


@pytest.mark.parametrize(
    ("admission", "in_training", "in_evaluation"),
    [
        (Dropless(), False, False),
        (Capacity(factor=0.5), True, False),
        (Capacity(factor=0.5, scope="always"), True, True),
        (DeviceCapacity(devices=2, factor=0.5), True, False),
    ],
    ids=["dropless", "capacity", "capacity always", "devices"],
)
def test_drops_happen_only_where_the_configuration_says(
    *, admission: Dropless | Capacity | DeviceCapacity, in_training: bool, in_evaluation: bool
) -> None:
    wanted, every = routing(40, 4, 2, seed=0), tokens(40)
    for training, drops in ((True, in_training), (False, in_evaluation)):
        admitted = admit(wanted, every, admission, LayerMode(training=training))
        assert (admitted.load_E().sum() < wanted.load_E().sum()) == drops


@given(
    seed=st.integers(0, 10**6), fraction=st.sampled_from([0.0, 0.3, 1.0]), factor=st.sampled_from([0.5, 1.0])
)
def test_devices_drop_their_lowest_affinities_except_in_exempt_sequences(
    seed: int, fraction: float, factor: float
) -> None:
    devices, experts, k, count = 3, 6, 3, 30
    wanted, every = (
        routing(count, experts, k, seed, padding=4),
        tokens(count, sequences=5, padding=4, seed=seed),
    )
    admission = DeviceCapacity(devices=devices, factor=factor, exempt=fraction)
    admitted = admit(wanted, every, admission, TRAINING)
    limit = math.ceil(Fraction(factor) * int(wanted.keep_TK.sum()) / devices)
    free_T = exempt(every, fraction)
    for device in range(devices):
        here = wanted.keep_TK & (wanted.experts_TK // 2 == device)
        bound, kept = here & ~free_T[:, None], here & admitted.keep_TK
        assert torch.equal(here & free_T[:, None], kept & free_T[:, None])
        room = max(0, limit - int((here & free_T[:, None]).sum()))
        assert int((kept & bound).sum()) == min(int(bound.sum()), room)
        dropped = bound & ~kept
        if dropped.any() and (kept & bound).any():
            assert wanted.weights_TK[dropped].max() <= wanted.weights_TK[kept & bound].min()


def test_balanced_devices_drop_nothing() -> None:
    experts_TK = torch.arange(24).view(12, 2) % 6
    scores_TE = torch.rand(12, 6)
    keep_TK = torch.ones(12, 2, dtype=torch.bool)
    wanted = decision(scores_TE, experts_TK, keep_TK)
    admitted = admit(wanted, tokens(12), DeviceCapacity(devices=3, exempt=0.0), TRAINING)
    assert admitted.keep_TK.all()


def test_exemption_belongs_to_the_sequence_and_not_to_its_place_in_a_batch() -> None:
    sequences, length = 2000, 7
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(500, (sequences * length,), generator=generator)
    sequence_T = torch.arange(sequences).repeat_interleave(length)
    position_T = torch.arange(length).repeat(sequences)
    every = Tokens(ids_T, sequence_T, position_T, torch.ones_like(ids_T, dtype=torch.bool))
    free_T = exempt(every, 0.1)
    by_sequence = free_T.view(sequences, length)
    assert torch.equal(by_sequence.any(dim=1), by_sequence.all(dim=1))
    assert abs(float(free_T.float().mean()) - 0.1) < 0.02
    half = slice(1000 * length, None)
    later = Tokens(ids_T[half], sequence_T[half] - 1000, position_T[half], every.valid_T[half])
    assert torch.equal(exempt(later, 0.1), free_T[half])
    assert not exempt(every, 0.0).any()
    assert exempt(every, 1.0).all()
