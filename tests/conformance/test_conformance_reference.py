"""The shipped vectors once more, from the independent single-file reference of each system."""

from __future__ import annotations

import pytest

from conformance.revealing import LAYERS, asked, valid_of
from consilium.conformance import suite as conformance
from consilium.conformance.suite import Case, Vectors

SHIPPED = conformance.shipped()
BEYOND = {
    ("switch:c", "every expert"): "Switch's equations have one expert, as its name says",
    ("deepseek-v2:236b", "every expert"): "equation 30 has the M that the router has, 3 and not 8",
    ("deepseek-v2:236b", "crowded, capacity factor 0.5"): "section 2.2.4 has a capacity factor of 1",
}
"""What a reference, which is the paper's text, cannot say."""
PAIRS = [(v, case) for v in SHIPPED for case in v.cases if (v.model, case.name) not in BEYOND]


@pytest.mark.parametrize(("vectors", "case"), PAIRS, ids=[f"{v.model}-{c.name}" for v, c in PAIRS])
def test_the_reference_gives_the_vector(vectors: Vectors, case: Case) -> None:
    rows, losses = asked(vectors, case)
    expected = [
        {e: w for e, w, fits in zip(ids, weights, kept, strict=True) if fits}
        for ids, weights, kept, ok in zip(
            case.experts_TK, case.weights_TK, case.admitted_TK, valid_of(case), strict=True
        )
        if ok
    ]
    assert [set(row) for row in rows] == [set(row) for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    used = {name: value for name, value in losses.items() if name in case.losses or value}
    assert used == pytest.approx(dict(case.losses), rel=1e-5, abs=1e-9)


def test_every_system_with_vectors_has_a_reference() -> None:
    assert {vectors.model.partition(":")[0] for vectors in SHIPPED} == set(LAYERS)
