from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.ops import orthogonal
from consilium.ops.orthogonal import COEFFICIENTS, orthogonalised
from support import relative_error


def naive(matrix_MN: Tensor, iterations: int) -> Tensor:
    """The quintic on the singular values themselves, in float64."""
    u, s, vh = torch.linalg.svd(matrix_MN.double(), full_matrices=False)
    s = s / matrix_MN.double().norm()
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


def stack(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    count=st.integers(1, 4),
    rows=st.sampled_from([1, 3, 8, 33]),
    columns=st.sampled_from([1, 5, 8, 40]),
    scale=st.sampled_from([1e-5, 1.0, 1e6]),
    iterations=st.sampled_from([1, 5]),
)
def test_each_matrix_of_a_stack_equals_its_decomposition(
    count: int, rows: int, columns: int, scale: float, iterations: int
) -> None:
    stack_PMN = scale * stack(count, rows, columns)
    actual_PMN = orthogonalised(stack_PMN, iterations=iterations)
    for actual_MN, matrix_MN in zip(actual_PMN, stack_PMN, strict=True):
        assert relative_error(actual_MN, naive(matrix_MN, iterations)) < 2e-4


def test_singular_values_come_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalised(stack(6, 24, 48)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_matrix_of_zeros_stays_one_beside_others() -> None:
    stack_PMN = stack(3, 8, 5)
    stack_PMN[1] = 0
    result_PMN = orthogonalised(stack_PMN)
    assert not result_PMN[1].any()
    assert relative_error(result_PMN[2], naive(stack_PMN[2], 5)) < 2e-4


def test_a_large_stack_in_parts_equals_one_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stack_PMN = stack(7, 6, 9)
    whole_PMN = orthogonalised(stack_PMN)
    monkeypatch.setattr(orthogonal, "TOGETHER", 2 * 6 * 9)
    assert relative_error(orthogonalised(stack_PMN), whole_PMN) < 1e-6


def test_products_in_bfloat16_stay_near_those_in_float32() -> None:
    stack_PMN = stack(4, 32, 64)
    rounded_PMN = orthogonalised(stack_PMN, products=torch.bfloat16)
    assert rounded_PMN.dtype == torch.float32
    assert 1e-4 < relative_error(rounded_PMN, orthogonalised(stack_PMN)) < 3e-2
