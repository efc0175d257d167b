"""Clusters of equal size and gates that load experts alike."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.upcycling.clusters import (
    balanced_assignment,
    balanced_clusters,
    centres,
    directions,
    members,
)
from consilium.upcycling.gates import levelled, random_rows


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
