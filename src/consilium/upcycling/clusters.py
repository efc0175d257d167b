"""Clusters of equal size, and the leading directions of a matrix.

Legend: N points, C clusters, P features of a point, S points of a cluster.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_ROUNDS: Final = 12


def balanced_clusters(points_NP: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means whose clusters take at most ceil(N / C) points each: int64 [N], the cluster of each point.

    Seeds are drawn far from one another (k-means++); a point that finds its cluster full goes to the next.
    """
    centres_CP = _seeds(points_NP, clusters, generator)
    assigned_N = balanced_assignment(_distances(points_NP, centres_CP))
    for _ in range(_ROUNDS):
        moved_N = balanced_assignment(_distances(points_NP, centres(points_NP, assigned_N, clusters)))
        if torch.equal(moved_N, assigned_N):
            break
        assigned_N = moved_N
    return assigned_N


def centres(points_NP: Tensor, assigned_N: Tensor, clusters: int) -> Tensor:
    """Means [C, P] of the points of each cluster; zeros of one without points."""
    sums_CP = torch.zeros(clusters, points_NP.shape[1]).index_add_(0, assigned_N, points_NP.float())
    return sums_CP / assigned_N.bincount(minlength=clusters).clamp(min=1)[:, None]


def balanced_assignment(costs_NC: Tensor) -> Tensor:
    """int64 [N]: a cheap cluster for each point, none with more than ceil(N / C).

    In rounds: every point that has none asks for its cheapest cluster with room; where too many ask, those
    stay that would lose most by going elsewhere. In each round a cluster fills up or all are placed.
    """
    points, clusters = costs_NC.shape
    room_C = torch.full((clusters,), -(-points // clusters))
    assigned_N = torch.full((points,), -1)
    while (waiting_M := (assigned_N < 0).nonzero().flatten()).numel():
        open_MC = costs_NC[waiting_M].masked_fill(room_C == 0, torch.inf)
        best_M2 = open_MC.topk(min(2, clusters), dim=1, largest=False)
        regret_M = best_M2.values[:, -1] - best_M2.values[:, 0]
        for cluster in best_M2.indices[:, 0].unique().tolist():
            asking = (best_M2.indices[:, 0] == cluster).nonzero().flatten()
            order = regret_M[asking].sort(descending=True, stable=True).indices
            taken = asking[order[: int(room_C[cluster])]]
            assigned_N[waiting_M[taken]] = cluster
            room_C[cluster] -= taken.numel()
    return assigned_N


def members(assigned_N: Tensor, clusters: int) -> Tensor:
    """int64 [C, S]: the points of each cluster in order, where all have as many."""
    return assigned_N.sort(stable=True).indices.view(clusters, -1)


def directions(matrix_MN: Tensor, count: int, seed: int) -> Tensor:
    """The ``count`` leading right singular vectors [N, count] of a matrix, each times its value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, values_R, right_NR = torch.svd_lowrank(matrix_MN, q=min(count, *matrix_MN.shape), niter=4)
    return right_NR * values_R


def _distances(points_NP: Tensor, centres_CP: Tensor) -> Tensor:
    """Squared, up to what a point has in common with all centres."""
    points_NP = points_NP.float()
    return centres_CP.square().sum(1) - 2 * points_NP @ centres_CP.T


def _seeds(points_NP: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    points_NP = points_NP.float()
    chosen = [int(torch.randint(len(points_NP), (), generator=generator))]
    apart_N = torch.full((len(points_NP),), torch.inf)
    while len(chosen) < clusters:
        apart_N = torch.minimum(apart_N, (points_NP - points_NP[chosen[-1]]).square().sum(1))
        weights_N = apart_N.double()
        weights_N[chosen] = 0
        if not float(weights_N.sum()):
            weights_N = torch.ones_like(weights_N)
            weights_N[chosen] = 0
        chosen.append(int(torch.multinomial(weights_N, 1, generator=generator)))
    return points_NP[chosen]
