"""Weights that no published value pins: an epsilon large enough to be seen.

Legend: T tokens, K choices a token.
"""

from __future__ import annotations

import pytest
import torch

from consilium.config.router import Normalised, Relu, Router, Score, Sigmoid, TopK
from consilium.moe.types import LayerMode
from moe.cases import layer, moe, tokens, vectors
from support import relative_error


@pytest.mark.parametrize("epsilon", [0.0, 0.3])
@pytest.mark.parametrize("score", [Sigmoid(), Relu()], ids=repr)
def test_normalised_weights_are_scores_over_their_sum_plus_epsilon(score: Score, epsilon: float) -> None:
    config = Router(score=score, select=TopK(k=3), weight=Normalised(epsilon=epsilon), scale=2.5)
    built, every = layer(moe(config)).router, tokens(63, padding=5)
    routing = built(vectors(63), None, every, LayerMode())
    expected_TK = torch.zeros(63, 3, dtype=torch.float64)
    for t in range(58):
        scores = [routing.scores_TE[t, e].double() for e in routing.experts_TK[t]]
        if any(scores):
            expected_TK[t] = torch.stack([2.5 * s / (sum(scores) + epsilon) for s in scores])
    assert relative_error(routing.weights_TK, expected_TK) < 1e-6
    at_TK = vectors(63, seed=3, hidden=3)
    gate = built.projection.weight
    (found,) = torch.autograd.grad((routing.weights_TK * at_TK).sum(), gate, retain_graph=True)
    (wanted,) = torch.autograd.grad((expected_TK * at_TK).sum(), gate)
    assert relative_error(found, wanted) < 1e-5
