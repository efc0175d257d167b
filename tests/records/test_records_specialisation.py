from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.errors import ConsiliumError
from consilium.records.io import from_json, to_json
from consilium.records.specialisation import Association, LayerSpecialisation, Specialisation, entropy_bits


def association(counts: list[list[int]], bits: float = 0.5, shuffled: float = 0.1) -> Association:
    return Association(
        counts_EL=tuple(tuple(row) for row in counts), bits=bits, shuffled_bits=shuffled, shuffles=8
    )


@given(st.lists(st.integers(0, 1000), max_size=20))
def test_entropy_lies_between_none_and_uniform(counts: list[int]) -> None:
    entropy = entropy_bits(counts)
    assert -1e-12 <= entropy <= math.log2(max(len(counts), 1)) + 1e-9
    if sum(counts):
        assert 2**entropy <= sum(count > 0 for count in counts) + 1e-9


@given(st.integers(1, 64), st.integers(1, 100))
def test_even_counts_have_the_entropy_of_their_number(experts: int, count: int) -> None:
    assert entropy_bits([count] * experts) == pytest.approx(math.log2(experts), abs=1e-12)


def test_the_share_of_the_choice_is_above_chance_over_its_entropy() -> None:
    part = association([[10, 0], [10, 0], [0, 10], [0, 10]], bits=1.0, shuffled=0.2)
    assert part.corrected_bits == pytest.approx(0.8)
    assert part.normalised == pytest.approx(0.4)


def test_without_a_choice_nothing_is_explained() -> None:
    assert association([[5, 5]], bits=0.0, shuffled=0.0).normalised == 0.0
    assert association([[0, 0], [0, 0]], bits=0.0, shuffled=0.0).normalised == 0.0


def test_a_table_survives_json() -> None:
    layer = LayerSpecialisation(layer=1, domain=association([[1, 2]]), syntax=association([[3, 4, 5]]))
    record = Specialisation(domains=("a", "b"), syntaxes=("x", "y", "z"), tokens=3, layers=(layer,))
    assert from_json(Specialisation, to_json(record), where="test") == record


def test_counts_that_do_not_fit_their_labels_are_refused() -> None:
    layer = LayerSpecialisation(layer=4, domain=association([[1, 2]]), syntax=association([[3]]))
    with pytest.raises(ValueError, match="layer 4 has counts that do not fit its labels"):
        Specialisation(domains=("a",), syntaxes=("x",), tokens=3, layers=(layer,))
    whole = Specialisation(domains=("a", "b"), syntaxes=("x",), tokens=3, layers=(layer,))
    damaged = to_json(whole).replace('"b"', '"b", "c"')
    with pytest.raises(
        ConsiliumError, match=r"^s\.json: layer 4 has counts that do not fit its labels; damaged"
    ):
        from_json(Specialisation, damaged, where="s.json")
