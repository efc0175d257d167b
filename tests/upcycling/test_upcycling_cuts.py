"""Each method finds what it is named for, on networks in which the answer is planted.

Legend: T tokens, D hidden size, F width, E experts, K kinds of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor

from consilium.config.upcycling import (
    Carve,
    ClusterSplit,
    GraphSplit,
    InnerSplit,
    InterSplit,
    Method,
    Upcycling,
)
from consilium.upcycling.cut import Cut, Network, cut

KINDS = 4
TOKENS = 160
ONE = torch.eye(12)
"""A token of kind k has 1 in dimension k, every token in dimensions 4 to 7, and none in the others."""
KIND_T = torch.arange(TOKENS) % KINDS
ALIKE_F = torch.arange(24) // 6
APART_F = torch.arange(24) % 4
SEEDS = (0, 1, 2)
"""Who guesses has to guess three times."""

Groups = set[frozenset[int]]


def noise(*shape: int) -> Tensor:
    return 0.01 * torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def network(gate_FD: Tensor, up_FD: Tensor, importance_TF: Tensor | None = None) -> Network:
    x_TD = ONE[KIND_T] + ONE[4:8].sum(0) + noise(TOKENS, 12)
    up_GD = torch.cat((gate_FD, up_FD))
    return Network(up_GD + noise(*up_GD.shape), noise(12, len(up_FD)), "swiglu", x_TD, importance_TF)


def decided(made: Network, method: Method, seed: int, *, experts: int = KINDS, shared: int = 0) -> Cut:
    asked = Upcycling(method=method, experts=experts, top_k=1, shared=shared, seed=seed)
    return cut(made, asked, torch.Generator().manual_seed(seed))


def groups(parts: Iterable[Iterable[int]]) -> Groups:
    return {frozenset(part) for part in parts}


def labelled(label_F: Tensor) -> Groups:
    return groups((label_F == label).nonzero().flatten().tolist() for label in label_F.unique())


def chosen(plan: Cut, made: Network) -> Sequence[frozenset[int]]:
    """By kind, the neurons of the expert that every token of it chooses."""
    best_T = (made.x_TD @ plan.gate(made.x_TD, 1, 1e-2).T).argmax(1)
    ours_K = [best_T[kind::KINDS].unique().tolist() for kind in range(KINDS)]
    assert [len(experts) for experts in ours_K] == [1] * KINDS
    return [frozenset(plan.neurons_ES[expert].tolist()) for (expert,) in ours_K]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("which", ["gate", "up"])
def test_clusters_are_those_of_the_rows_asked_for(which: Literal["gate", "up"], seed: int) -> None:
    made = network(gate_FD=20 * ONE[APART_F], up_FD=20 * ONE[ALIKE_F])
    plan = decided(made, ClusterSplit(rows=which), seed)
    assert groups(plan.neurons_ES.tolist()) == labelled({"gate": APART_F, "up": ALIKE_F}[which])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_clusters_are_of_rows_that_are_near_or_point_alike(
    metric: Literal["l2", "cosine"], seed: int
) -> None:
    """Rows are of two lengths, 29 apart, in two directions, in which the long ones are 6 apart."""
    long_F, aside_F = torch.arange(24) // 12, torch.arange(24) % 2
    up_FD = (1 + 29 * long_F)[:, None] * (ONE[0] + 0.2 * aside_F[:, None] * ONE[1])
    plan = decided(network(torch.zeros(24, 12), up_FD), ClusterSplit(metric=metric), seed, experts=2)
    assert groups(plan.neurons_ES.tolist()) == labelled({"l2": long_F, "cosine": aside_F}[metric])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_graph_joins_neurons_that_are_active_together(seed: int) -> None:
    """What makes rows of either matrix alike is in dimensions that tell no token from another."""
    made = network(gate_FD=8 * ONE[APART_F] + 50 * ONE[8 + ALIKE_F], up_FD=5 * ONE[4 + ALIKE_F])
    plan = decided(made, GraphSplit(), seed)
    assert groups(plan.neurons_ES.tolist()) == labelled(APART_F)


@pytest.mark.parametrize("seed", SEEDS)
def test_inner_sharing_gives_a_kind_of_tokens_what_matters_to_it_and_sends_it_there(seed: int) -> None:
    """Each kind needs three neurons that the one before needs as well; nine are needed by none."""
    needed = [frozenset(range(3 * kind, 3 * kind + 6)) for kind in range(KINDS)]
    importance_TF = noise(TOKENS, 24).abs()
    for kind, neurons in enumerate(needed):
        importance_TF[kind::KINDS, sorted(neurons)] += 1
    made = network(torch.zeros(24, 12), torch.zeros(24, 12), importance_TF)
    plan = decided(made, InnerSplit(), seed)
    assert groups(plan.neurons_ES.tolist()) == set(needed)
    assert chosen(plan, made) == needed


@pytest.mark.parametrize("seed", SEEDS)
def test_inter_sharing_shares_what_most_kinds_need_and_splits_the_rest(seed: int) -> None:
    """Neurons 16 to 19 matter to all kinds but one, and to each kind one of its own matters far more."""
    importance_TF = noise(TOKENS, 20).abs()
    importance_TF[:, 16:] += 2
    for kind in range(KINDS):
        importance_TF[kind::KINDS, 4 * kind : 4 * kind + 4] += 1
        importance_TF[kind::KINDS, 4 * kind] += 99
        importance_TF[kind::KINDS, 16 + kind] -= 2
    made = network(torch.zeros(20, 12), torch.zeros(20, 12), importance_TF)
    plan = decided(made, InterSplit(), seed, shared=1)
    assert plan.shared_N is not None
    assert plan.shared_N.tolist() == [16, 17, 18, 19]
    assert chosen(plan, made) == [frozenset(range(4 * kind, 4 * kind + 4)) for kind in range(KINDS)]


@pytest.mark.parametrize("seed", SEEDS)
def test_carving_shares_what_is_always_active_and_groups_the_rest_by_when_it_is(seed: int) -> None:
    """Neurons 16 to 19 are always active, a little; of each kind's own ones one misses half of its tokens."""
    gate_FD = torch.cat((10 * ONE[torch.arange(16) // 4], ONE[4].expand(4, 12)))
    gate_FD[3:16:4] -= 8 * ONE[8]
    made = network(gate_FD, up_FD=ONE[4 + torch.arange(20) % 4])
    made.x_TD[: TOKENS // 2, 8] += 2
    plan = decided(made, Carve(active=0.4), seed, shared=1)
    assert plan.shared_N is not None
    assert plan.shared_N.tolist() == [16, 17, 18, 19]
    own = [frozenset(range(4 * kind, 4 * kind + 4)) for kind in range(KINDS)]
    assert groups(plan.neurons_ES.tolist()) == set(own)
    for row_D, neurons_S in zip(plan.rows_CD, plan.neurons_ES, strict=True):
        assert any(torch.equal(row_D, made.rows("gate")[n]) for n in neurons_S[:3]), "a typical one"
    assert chosen(plan, made) == own
