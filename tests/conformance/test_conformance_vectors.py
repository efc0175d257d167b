"""The vectors that are shipped: our router gives them, and their sources still do."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from conformance import by_hand, generate, oracles
from consilium.conformance import suite as conformance
from consilium.conformance.suite import Vectors
from consilium.recipes import catalogue

SHIPPED = conformance.shipped()
KINDS = {
    "ordinary",
    "ties",
    "uniform",
    "one-hot",
    "padding",
    "fewer tokens than experts",
    "one token",
    "a gate matrix",
}
SIZES = {
    "experts",
    "admission.exempt",
    "admission.factor",
    "admission.group_tokens",
    "router.select.factor",
    "router.select.groups",
    "router.select.groups.keep",
    "router.select.k",
    "router.select.keep",
    "router.select.vocab_size",
}


def model_of(vectors: Vectors) -> str:
    return vectors.model


@pytest.mark.parametrize("vectors", SHIPPED, ids=model_of)
def test_every_shipped_vector_is_what_our_router_decides(vectors: Vectors) -> None:
    verdict = conformance.check(vectors)
    assert verdict.differences == ()
    assert verdict.weight_error < conformance.TOLERANCE
    assert verdict.choices > 50


def test_every_recipe_that_routes_has_vectors() -> None:
    routing = {recipe.name for recipe in catalogue.systems() if recipe.model().moe is not None}
    shipped = {vectors.model.partition(":")[0] for vectors in SHIPPED}
    assert shipped == routing


@pytest.mark.parametrize("vectors", SHIPPED, ids=model_of)
def test_every_system_has_every_kind_of_case(vectors: Vectors) -> None:
    cases = {case.name: case for case in vectors.cases}
    router = vectors.moe(vectors.cases[0]).router
    biases = {"negative biases", "positive biases", "biases of both signs"}
    assert set(cases) >= KINDS
    assert set(cases) >= (biases if router.offset != "none" else {"a bias to ignore"})
    assert len(cases["one token"].x_TD) == 1
    assert not all(cases["padding"].valid_T or ())
    assert all(abs(b) >= 1.5 for case in cases.values() for b in case.bias_E or (2.0,))


@pytest.mark.parametrize("vectors", SHIPPED, ids=model_of)
def test_a_token_can_use_every_expert(vectors: Vectors) -> None:
    """By k = E; hash tables and GShard's two have no such size."""
    config = vectors.moe(vectors.cases[0])
    if config.router.select.kind in ("hash", "sampled_second"):
        return
    rows = [row for case in vectors.cases for row in case.experts_TK if len(case.load_E) == config.experts]
    assert config.experts in {len(set(row)) for row in rows}


@pytest.mark.parametrize("vectors", SHIPPED, ids=model_of)
def test_vectors_change_sizes_and_no_rule(vectors: Vectors) -> None:
    assert set(vectors.sizes) <= SIZES
    for case in vectors.cases:
        # By hand DeepSeekMoE has two devices instead of four, and their number stands in a list.
        allowed = SIZES | {"balance.losses"} if case.name.endswith("by hand") else SIZES
        assert set(case.sizes) <= allowed, case.name


@pytest.mark.parametrize("vectors", SHIPPED, ids=model_of)
def test_every_system_answers_to_transformers_or_to_a_case_by_hand(vectors: Vectors) -> None:
    origins = [case.origin for case in vectors.cases]
    system = vectors.model.partition(":")[0]
    by_transformers = sum(origin.startswith("transformers") for origin in origins)
    worked = sum(origin == "by hand: tests/conformance/by_hand.py" for origin in origins)
    assert worked == 1 if system not in oracles.ORACLES else by_transformers >= 5


@pytest.mark.parametrize("vectors", SHIPPED, ids=model_of)
def test_sources_still_say_what_was_shipped(vectors: Vectors) -> None:
    """Made anew by transformers, by hand and by loops; the last digit may differ between processors."""
    again = json.loads(generate.written(generate.vectors(vectors.model)))
    kept = json.loads(generate.file_of(vectors.model).read_text("utf-8"))
    for new, old in zip(again["cases"], kept["cases"], strict=True):
        new["origin"], old["origin"] = (data["origin"].partition(" 5.")[0] for data in (new, old))
    assert_same(again, kept)


def assert_same(new: Any, old: Any) -> None:
    match new:
        case dict():
            assert list(new) == list(old)
            for key, value in new.items():
                assert_same(value, old[key])
        case list():
            assert len(new) == len(old)
            for one, other in zip(new, old, strict=True):
                assert_same(one, other)
        case float():
            assert math.isclose(new, old, rel_tol=1e-6, abs_tol=1e-9), (new, old)
        case _:
            assert new == old


def test_the_table_of_the_hand_worked_case_adds_up() -> None:
    """Every figure of its text follows from the counts that the logits are logarithms of."""
    p = [[n / sum(row) for n in row] for row in by_hand.COUNTS]
    chosen = [sorted(range(4), key=lambda e, row=row: (-row[e], e))[:2] for row in p]
    load = [sum(e in row for row in chosen) for e in range(4)]
    total = [sum(row[e] for row in p) for e in range(4)]
    f = [4 * n / 12 for n in load]
    assert chosen == by_hand.BEST_TWO
    assert load == by_hand.LOADS
    assert total == pytest.approx([1.85, 1.45, 1.55, 1.15])
    assert sum(a * b / 6 for a, b in zip(f, total, strict=True)) == pytest.approx(by_hand.EXPERT_LOSS)
    weights = by_hand.fractions(by_hand.OVER_THE_SUM)
    summed = [0.0] * 4
    for ids, row in zip(chosen, weights, strict=True):
        assert sum(row) == pytest.approx(1)
        for e, w in zip(ids, row, strict=True):
            summed[e] += w
    assert [28 * v for v in summed] == pytest.approx([71, 42, 39, 16])
