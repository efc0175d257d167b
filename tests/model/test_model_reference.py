"""The model built from a recipe is its single-file reference: logits, every loss, every gradient.

References know nothing of packing: they run one document after another, and padding does not exist. They
compute in float64 throughout. A float64 model rounds what is float32 by contract (the router, rotary angles);
that leaves up to 2e-6 in the gradients of Switch, whose weights are raw probabilities, and 4e-7 elsewhere.
"""

from __future__ import annotations

import pytest
import torch

from model.reference_cases import LAYOUTS, SYSTEMS, TOLERANCE, outcomes, single_experts, wrong
from support import relative_error

cases = pytest.mark.parametrize(
    ("system", "layout", "dtype"),
    [(system, layout, torch.float64) for system in SYSTEMS for layout in LAYOUTS]
    + [(system, "packed documents", torch.float32) for system in SYSTEMS],
)


@cases
def test_logits_are_the_references(system: str, layout: str, dtype: torch.dtype) -> None:
    ours, expected = outcomes(system, layout, dtype)
    assert relative_error(ours.logits_TV, expected.logits_TV) < TOLERANCE[dtype]


@cases
def test_every_loss_and_their_sum_is_the_references(system: str, layout: str, dtype: torch.dtype) -> None:
    ours, expected = outcomes(system, layout, dtype)
    assert not wrong(ours.losses, expected.losses, TOLERANCE[dtype])
    assert all(float(loss) > 0 for loss in expected.losses.values())
    assert relative_error(ours.total, expected.total) < TOLERANCE[dtype]


@cases
def test_every_gradient_is_the_references(system: str, layout: str, dtype: torch.dtype) -> None:
    ours, expected = outcomes(system, layout, dtype)
    assert not wrong(ours.gradients, expected.gradients, TOLERANCE[dtype])


@cases
def test_the_gradient_of_each_single_expert_is_the_references(
    system: str, layout: str, dtype: torch.dtype
) -> None:
    """An expert with few tokens cannot hide behind its neighbours, and one without any has exactly zero."""
    ours, expected = outcomes(system, layout, dtype)
    mine, theirs = single_experts(ours.gradients), single_experts(expected.gradients)
    assert not wrong(mine, theirs, TOLERANCE[dtype])
