from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.analysis.load import dead_experts, load_entropy, max_over_mean, max_violation
from consilium.records.loads import max_over_mean as max_over_mean_of_a_list

loads = st.lists(st.integers(0, 10**9), min_size=2, max_size=40)


@given(loads)
def test_max_over_mean_is_the_same_on_tensors_and_lists(load: list[int]) -> None:
    fast, slow = float(max_over_mean(torch.tensor(load))), max_over_mean_of_a_list(load)
    assert fast == pytest.approx(slow, rel=1e-12, nan_ok=True)
    assert float(max_violation(torch.tensor(load))) == pytest.approx(slow - 1, abs=1e-12, nan_ok=True)


@given(st.lists(loads.filter(lambda load: len(load) >= 3).map(lambda load: load[:3]), min_size=1, max_size=6))
def test_every_row_is_measured_by_itself(rows: list[list[int]]) -> None:
    ratios = max_over_mean(torch.tensor(rows)).tolist()
    assert ratios == pytest.approx([max_over_mean_of_a_list(row) for row in rows], rel=1e-12, nan_ok=True)


@given(loads)
def test_entropy_agrees_with_its_definition(load: list[int]) -> None:
    entropy = float(load_entropy(torch.tensor(load)))
    total = sum(load)
    if total == 0:
        assert math.isnan(entropy)
        return
    slow = -sum(n / total * math.log(n / total) for n in load if n) / math.log(len(load))
    assert entropy == pytest.approx(slow, abs=1e-12)


@pytest.mark.parametrize("experts", [2, 3, 64])
def test_entropy_is_one_when_even_and_zero_when_one_expert_does_all(experts: int) -> None:
    assert float(load_entropy(torch.full((experts,), 5))) == pytest.approx(1.0)
    assert float(load_entropy(torch.eye(experts, dtype=torch.int64)[0])) == 0.0


def test_an_expert_is_dead_when_no_step_of_the_window_used_it() -> None:
    load_SE = torch.tensor([[0, 3, 0, 1], [0, 2, 1, 0]])
    assert dead_experts(load_SE).tolist() == [True, False, False, False]
