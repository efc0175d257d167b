"""Clusters of equal size and gates that load experts alike."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.config.moe import MoE
from consilium.config.router import Router, TopK
from consilium.config.upcycling import (
    Copy,
    Drop,
    Expand,
    InnerSplit,
    RandomSplit,
    Upcycling,
    VirtualGroup,
)
from consilium.evaluation.walk import Difference
from consilium.planner.upcycled import FLAT, begun, spread
from consilium.upcycling.clusters import (
    balanced_assignment,
    balanced_clusters,
    centres,
    directions,
    members,
)
from consilium.upcycling.gates import levelled, random_rows, vague
from upcycling.sources import LLAMA


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**30), st.booleans())
def test_no_cluster_takes_more_than_its_share(points: int, clusters: int, seed: int, tied: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs_NC = torch.randn(points, clusters, generator=generator)
    costs_NC = costs_NC.round() if tied else costs_NC
    assigned_N = balanced_assignment(costs_NC)
    sizes_C = assigned_N.bincount(minlength=clusters)
    assert int(sizes_C.sum()) == points
    assert int(sizes_C.max()) <= -(-points // clusters)
    assert torch.equal(assigned_N, balanced_assignment(costs_NC))


def test_where_there_is_room_every_point_gets_its_cheapest() -> None:
    cheapest_N = torch.arange(12) % 3
    costs_NC = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    costs_NC[torch.arange(12), cheapest_N] -= 2
    assert torch.equal(balanced_assignment(costs_NC), cheapest_N)


def test_clusters_that_are_apart_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    centres_CP = 20 * torch.eye(4)
    truth_N = torch.arange(40) % 4
    points_NP = centres_CP[truth_N] + torch.randn(40, 4, generator=generator)
    found_N = balanced_clusters(points_NP, 4, generator)
    groups = [set(truth_N[found_N == cluster].tolist()) for cluster in range(4)]
    assert sorted(map(len, groups)) == [1, 1, 1, 1]
    assert torch.allclose(
        centres(points_NP, found_N, 4).sort(dim=0).values[-1], torch.full((4,), 20.0), atol=2
    )
    assert members(found_N, 4).shape == (4, 10)


def test_equal_points_are_shared_out() -> None:
    found_N = balanced_clusters(torch.ones(9, 5), 3, torch.Generator().manual_seed(0))
    assert found_N.bincount().tolist() == [3, 3, 3]


def test_directions_are_the_leading_singular_vectors_and_leave_the_generator_alone() -> None:
    matrix_MN = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    found_NR = directions(matrix_MN, 12, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.allclose(found_NR @ found_NR.T, matrix_MN.T @ matrix_MN, atol=1e-3)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 16), st.integers(1, 3), st.floats(0.1, 5), st.integers(0, 2**20))
def test_a_levelled_gate_loads_experts_alike(experts: int, k: int, mean: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(2000, 24, generator=generator) * torch.rand(24, generator=generator)
    x_TD = x_TD + mean * torch.rand(24, generator=generator)
    k = min(k, experts - 1)
    gate_ED = levelled(random_rows(experts, 24, generator), x_TD, k, 1e-3)
    logits_TE = x_TD @ gate_ED.T
    load_E = logits_TE.topk(k, dim=1).indices.flatten().bincount(minlength=experts)
    assert int(load_E.max()) < 1.25 * 2000 * k / experts
    assert 0.5e-3 < float(logits_TE.std(0).mean()) < 3e-3


def test_equal_rows_stay_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(500, 16, generator=generator) + 1
    gate_ED = levelled(random_rows(3, 16, generator), x_TD, 1, 1e-3).repeat_interleave(5, dim=0)
    assert all((part == part[0]).all() for part in gate_ED.split(5))


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(2, 9), st.integers(0, 2**20))
def test_directions_that_say_nothing_new_are_found(data: st.DataObject, experts: int, seed: int) -> None:
    """Zeros, multiples of earlier rows and what all tokens have in common, beside any other row."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(300, 24, generator=generator) + 3
    x_TD[:, 23] = 2.0
    rows_ED = random_rows(experts, 24, generator)
    expected: list[bool] = []
    for expert in range(experts):
        kind = data.draw(st.sampled_from(["other", "nothing", "common", "again"]))
        if kind == "nothing":
            rows_ED[expert] *= data.draw(st.sampled_from([0.0, 1e-7]))
        elif kind == "common":
            rows_ED[expert] = torch.eye(24)[23]
        elif kind == "again" and False in expected:
            rows_ED[expert] = rows_ED[expected.index(False)] * 1.7 + 1e-7 * rows_ED[expert]
        expected.append(kind != "other" and (kind != "again" or False in expected))
    assert vague(rows_ED, x_TD).tolist() == expected


def test_a_difference_that_is_no_number_stays_none() -> None:
    one, nan = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    found = Difference().and_of(one, one + 2).and_of(nan, one).and_of(one, one)
    assert found.largest != found.largest
    assert found.relative != found.relative
    assert Difference().and_of(one, one + 2).and_of(one, one).largest == 2


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (Upcycling(method=Copy(), experts=4, top_k=2), 1e-2),
        (Upcycling(method=Copy(), experts=4, top_k=1), FLAT),
        (Upcycling(method=Drop(), experts=4, top_k=1), 1e-2),
        (Upcycling(method=Drop(fresh=0.0), experts=4, top_k=1), FLAT),
        (Upcycling(method=VirtualGroup(granularity=2), experts=4, top_k=2), FLAT),
        (Upcycling(method=VirtualGroup(weights="normalised"), experts=4, top_k=2), 1e-2),
        (Upcycling(method=RandomSplit(), experts=4, top_k=4), 1e-6),
        (Upcycling(method=RandomSplit(), experts=4, top_k=4, scale="ratio"), 1e-2),
        (Upcycling(method=RandomSplit(), experts=4, top_k=2), 1e-2),
        (Upcycling(method=InnerSplit(), experts=4, top_k=4), 1e-2),
    ],
)
def test_logits_are_next_to_nothing_where_equality_needs_it(asked: Upcycling, expected: float) -> None:
    assert spread(asked) == expected
    assert spread(dataclasses.replace(asked, spread=0.3)) == 0.3


@pytest.mark.parametrize(("top_k", "expected"), [(4, FLAT), (2, 10.0), (3, 10.0)])
def test_copies_are_far_apart_unless_all_are_chosen(top_k: int, expected: float) -> None:
    moe = MoE(experts=4, width=16, router=Router(select=TopK(k=2)))
    source = dataclasses.replace(LLAMA, family="mixtral", moe=moe)
    asked = Upcycling(method=Expand(), experts=8, top_k=top_k)
    assert begun(source, asked).spread == expected
    assert begun(source, dataclasses.replace(asked, spread=0.3)).spread == 0.3
