from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from consilium.ops.norm import RMSNorm, rms_norm
from support import relative_error


def naive(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, weight (float32) and a gradient of the output, negative weights included."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return x.requires_grad_(), torch.randn(shape[-1], generator=generator).requires_grad_(), grad


def gradients(y: Tensor, grad: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, of, grad)


@given(
    rows=st.integers(1, 5),
    size=st.sampled_from([1, 3, 63, 64]),
    scale=st.sampled_from([1e-12, 1e-4, 1.0, 1e6]),
    epsilon=st.sampled_from([1e-6, 1e-5]),
)
def test_values_and_gradients_equal_the_formula_at_any_scale(
    rows: int, size: int, scale: float, epsilon: float
) -> None:
    x, weight, grad = inputs(rows, size)
    x = (x.detach() * scale).requires_grad_()
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    y, expected = rms_norm(x, weight, epsilon), naive(wide_x, wide_weight, epsilon)
    assert relative_error(y, expected) < 1e-6
    grad_x, grad_weight = gradients(y, grad, x, weight)
    expected_x, expected_weight = gradients(expected, grad.double(), wide_x, wide_weight)
    assert relative_error(grad_weight, expected_weight) < 1e-5
    # In one feature x / |x| is constant: the true gradient is what is left of a cancellation.
    if size > 1:
        assert relative_error(grad_x, expected_x) < 1e-5


def test_gradients_equal_finite_differences() -> None:
    x, weight, _ = inputs(3, 5)
    wide = tuple(t.detach().double().requires_grad_() for t in (x, weight))
    assert torch.autograd.gradcheck(lambda a, w: rms_norm(a, w, 1e-5), wide)


def test_statistics_of_bfloat16_rows_are_float32() -> None:
    x, weight, grad = inputs(4, 256, dtype=torch.bfloat16)
    y = rms_norm(x, weight, 1e-6)
    exact = naive(x.detach().float(), weight.detach(), 1e-6)
    grad_x, grad_weight = gradients(y, grad, x, weight)
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert torch.equal(y, exact.to(torch.bfloat16)) or relative_error(y, exact.to(torch.bfloat16)) < 1e-3


def test_large_bfloat16_rows_do_not_overflow_and_zero_rows_stay_zero() -> None:
    x = torch.cat([torch.full((1, 64), 1e18), torch.zeros(1, 64)]).to(torch.bfloat16).requires_grad_()
    y = rms_norm(x, torch.ones(64), 1e-6)
    y.sum().backward()
    assert torch.equal(y, torch.cat([torch.ones(1, 64), torch.zeros(1, 64)]).to(torch.bfloat16))
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad[0].abs().max() < 1e-20


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (2, 3, 8), (8,)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    x, weight, grad = inputs(*shape)
    y = rms_norm(x, weight, 1e-6)
    grad_x, grad_weight = gradients(y, grad, x, weight)
    assert y.shape == grad_x.shape == shape
    assert relative_error(y, naive(x, weight, 1e-6)) < 1e-6
    assert grad_weight.isfinite().all()


def test_rows_that_are_not_contiguous() -> None:
    x, weight, _ = inputs(6, 4)
    y = rms_norm(x.t()[:, :4], weight, 1e-6)
    assert relative_error(y, naive(x.t()[:, :4], weight, 1e-6)) < 1e-6


def test_inference_equals_training() -> None:
    x, weight, _ = inputs(3, 16)
    with torch.inference_mode():
        quiet = rms_norm(x, weight, 1e-6)
    assert torch.equal(quiet, rms_norm(x, weight, 1e-6))


def test_recomputation_gives_the_same_gradients() -> None:
    x, _, grad = inputs(3, 16)
    norm = RMSNorm(16)
    plain = gradients(norm(x), grad, x, norm.weight)
    again = gradients(checkpoint(norm, x, use_reentrant=False), grad, x, norm.weight)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_module_starts_at_one() -> None:
    norm = RMSNorm(4, epsilon=0.5)
    assert list(norm.state_dict()) == ["weight"]
    assert relative_error(norm(torch.ones(2, 4)), torch.full((2, 4), 1.5**-0.5)) < 1e-6
