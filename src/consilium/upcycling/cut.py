"""Which hidden neurons of a network each expert gets, and how its gate begins: one choice a layer.

Legend: T tokens, D hidden size, F width of the network, E routed experts, S neurons of an expert, N those of
the shared experts, M others, C rows of the gate that differ, G = 2F where the activation is gated (gate above
up) else F.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import assert_never, final

import torch
import torch.nn.functional as F
from torch import Tensor

from consilium.config.feed_forward import Activation
from consilium.config.upcycling import (
    BranchTrainMix,
    Carve,
    ClusterSplit,
    Copy,
    Drop,
    Expand,
    GraphSplit,
    InnerSplit,
    InterSplit,
    Latent,
    Qwen,
    RandomSplit,
    Upcycling,
    VirtualGroup,
)
from consilium.ops.feed_forward import activate
from consilium.upcycling.clusters import balanced_clusters, centres, directions, members
from consilium.upcycling.gates import levelled, random_rows, vague

_DIRECTIONS = 64
"""Eigenvectors that stand for a co-activation matrix."""


@final
@dataclass(frozen=True, slots=True)
class Network:
    """A layer's dense network, and what it saw of the calibration text."""

    up_GD: Tensor
    down_DF: Tensor
    activation: Activation
    x_TD: Tensor
    importance_TF: Tensor | None = None
    """|activation * gradient|, where the method asks for it."""

    @property
    def width(self) -> int:
        return self.down_DF.shape[1]

    def hidden(self) -> Tensor:
        """Activations [T, F]."""
        return activate(F.linear(self.x_TD, self.up_GD), self.activation)

    def rows(self, which: str) -> Tensor:
        """Rows [F, D] of the gate or of the up matrix; they are one where there is no gate."""
        return self.up_GD[: self.width] if which == "gate" else self.up_GD[-self.width :]


@final
@dataclass(frozen=True, slots=True)
class Cut:
    """What becomes of one network."""

    neurons_ES: Tensor
    """int64 neurons of each routed expert."""
    rows_CD: Tensor
    """Directions in which the gate begins, before they are levelled: a row for ``shards`` experts."""
    shards: int = 1
    shared_N: Tensor | None = None
    """int64 neurons of the shared experts; None without any, and where they have the whole network."""
    fresh_ES: Tensor | None = None
    """bool: those that are drawn anew."""

    def gate(self, x_TD: Tensor, k: int, spread: float) -> Tensor:
        """Rows [E, D] of a gate that chooses ``k`` experts alike on ``x_TD``."""
        rows_CD = levelled(self.rows_CD, x_TD, k // self.shards, spread)
        return rows_CD.repeat_interleave(self.shards, dim=0)


def needs_gradients(asked: Upcycling) -> bool:
    return isinstance(asked.method, InnerSplit | InterSplit)


def cut(network: Network, asked: Upcycling, generator: torch.Generator) -> Cut:
    """Decide by ``asked.method``. A function of its arguments and of the state of ``generator``."""
    method = asked.method
    match method:
        case RandomSplit():
            order_F = torch.randperm(network.width, generator=generator)
            return _parts(network, asked, generator, order_F)
        case ClusterSplit(rows=which, metric=metric):
            points_FD = network.rows(which).float()
            points_FD = F.normalize(points_FD, dim=1) if metric == "cosine" else points_FD
            return _parts(network, asked, generator, _grouped(points_FD, asked, generator))
        case GraphSplit():
            return _parts(network, asked, generator, _by_graph(network, asked, generator))
        case InnerSplit() | InterSplit():
            return _by_importance(network, asked, generator)
        case Carve(active=active):
            return _carved(network, asked, generator, active)
        case Copy() | BranchTrainMix():
            return _copies(network, asked, generator)
        case Drop(fresh=share):
            return _drawn_anew(_copies(network, asked, generator), share, generator)
        case VirtualGroup(granularity=shards):
            return _virtual_groups(network, asked, generator, shards)
        case Qwen(granularity=shards, fresh=share):
            return _drawn_anew(_shuffled(network, asked, generator, shards), share, generator)
        case Expand() | Latent():
            raise AssertionError(f"{method.kind} cuts no network")
        case _:
            assert_never(method)


def _parts(network: Network, asked: Upcycling, generator: torch.Generator, order_F: Tensor) -> Cut:
    """Neurons in order, cut into equal parts, of which the last ``asked.shared`` are shared."""
    slices_XS = order_F.view(asked.experts + asked.shared, -1).sort(dim=1).values
    shared_N = slices_XS[asked.experts :].flatten() if asked.shared else None
    rows_ED = _random_gate(network, asked, generator)
    return Cut(slices_XS[: asked.experts].clone(), rows_ED, shared_N=shared_N)


def _random_gate(network: Network, asked: Upcycling, generator: torch.Generator) -> Tensor:
    return random_rows(asked.experts, network.x_TD.shape[1], generator)


def _grouped(points_FP: Tensor, asked: Upcycling, generator: torch.Generator) -> Tensor:
    """Neurons in an order in which each cluster follows the one before."""
    clusters = asked.experts + asked.shared
    return members(balanced_clusters(points_FP, clusters, generator), clusters).flatten()


def _by_graph(network: Network, asked: Upcycling, generator: torch.Generator) -> Tensor:
    """Spectral clustering: of the matrix of |activation| by token, each neuron of unit length."""
    hidden_TF = network.hidden().abs()
    unit_TF = hidden_TF / hidden_TF.norm(dim=0).clamp(min=1e-12)
    points_FP = directions(unit_TF, _DIRECTIONS, asked.seed)
    return _grouped(F.normalize(points_FP, dim=1), asked, generator)


def _by_importance(network: Network, asked: Upcycling, generator: torch.Generator) -> Cut:
    """Clusters of tokens, and for each the neurons that matter most to it; its centre is the gate's row."""
    assert network.importance_TF is not None, "this method asks for gradients"
    x_TD = network.x_TD - network.x_TD.mean(0)
    cluster_T = balanced_clusters(F.normalize(x_TD, dim=1), asked.experts, generator)
    importance_EF = centres(network.importance_TF, cluster_T, asked.experts)
    size = network.width // (asked.experts + asked.shared)
    shared_N = None
    if asked.shared:
        shared_N = _needed_by_most(importance_EF, size, asked.shared * size)
        importance_EF = importance_EF.index_fill(1, shared_N, -1.0)
    neurons_ES = importance_EF.topk(size, dim=1).indices.sort(dim=1).values
    return Cut(neurons_ES, centres(x_TD, cluster_T, asked.experts), shared_N=shared_N)


def _needed_by_most(importance_EF: Tensor, size: int, count: int) -> Tensor:
    """Neurons that are among the ``size`` most important of the most clusters, by importance where alike."""
    among_F = torch.zeros_like(importance_EF).scatter_(1, importance_EF.topk(size, dim=1).indices, 1.0).sum(0)
    whole_F = importance_EF.sum(0)
    return (among_F + 0.5 * whole_F / whole_F.max().clamp(min=1e-30)).topk(count).indices.sort().values


def _carved(network: Network, asked: Upcycling, generator: torch.Generator, active: float) -> Cut:
    hidden_TF = network.hidden().abs()
    most = max(1, round(active * network.width))
    active_TF = torch.zeros_like(hidden_TF).scatter_(1, hidden_TF.topk(most, dim=1).indices, 1.0)
    size = network.width // (asked.experts + asked.shared)
    order_F = active_TF.sum(0).sort(descending=True, stable=True).indices
    shared_N, others_M = (
        order_F[: asked.shared * size].sort().values,
        order_F[asked.shared * size :].sort().values,
    )
    points_MP = directions(active_TF[:, others_M], _DIRECTIONS, asked.seed)
    cluster_M = balanced_clusters(points_MP, asked.experts, generator)
    typical_E = _typical(points_MP, cluster_M, asked.experts)
    rows_ED = network.rows("gate")[others_M[typical_E]].float()
    # Neurons that are dead, or alike, tell no expert from another.
    random_ED = _random_gate(network, asked, generator)
    rows_ED = torch.where(vague(rows_ED, network.x_TD)[:, None], random_ED, rows_ED)
    neurons_ES = others_M[members(cluster_M, asked.experts)]
    return Cut(neurons_ES, rows_ED, shared_N=shared_N if asked.shared else None)


def _typical(points_MP: Tensor, cluster_M: Tensor, clusters: int) -> Tensor:
    """int64 [C]: of each cluster the point nearest to its centre."""
    apart_M = (points_MP - centres(points_MP, cluster_M, clusters)[cluster_M]).square().sum(1)
    own_CM = cluster_M[None, :] == torch.arange(clusters)[:, None]
    return torch.where(own_CM, apart_M[None, :], torch.inf).argmin(1)


def _copies(network: Network, asked: Upcycling, generator: torch.Generator) -> Cut:
    neurons_ES = torch.arange(network.width).repeat(asked.experts, 1)
    return Cut(neurons_ES, _random_gate(network, asked, generator))


def _virtual_groups(network: Network, asked: Upcycling, generator: torch.Generator, shards: int) -> Cut:
    """Expert e is shard e mod G of its copy e // G, and the copies have a gate row each."""
    neurons_ES = torch.arange(network.width).view(shards, -1).repeat(asked.experts, 1)
    return Cut(neurons_ES, _random_gate(network, asked, generator), shards)


def _shuffled(network: Network, asked: Upcycling, generator: torch.Generator, shards: int) -> Cut:
    """The neurons of each copy in an order of their own, cut into ``shards``."""
    orders = [torch.randperm(network.width, generator=generator) for _ in range(asked.experts)]
    neurons_ES = torch.stack(orders).view(asked.experts * shards, -1).sort(dim=1).values
    return Cut(neurons_ES, random_rows(len(neurons_ES), network.x_TD.shape[1], generator))


def _drawn_anew(plan: Cut, share: float, generator: torch.Generator) -> Cut:
    """``plan`` with this share of each expert's neurons to be drawn anew."""
    experts, size = plan.neurons_ES.shape
    places_ES = torch.rand(experts, size, generator=generator).argsort(dim=1)
    fresh_ES = torch.zeros(experts, size, dtype=torch.bool)
    fresh_ES.scatter_(1, places_ES[:, : round(share * size)], value=True)
    return replace(plan, fresh_ES=fresh_ES)
