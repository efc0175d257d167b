from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from consilium.config.feed_forward import GATED, Activation
from consilium.ops.feed_forward import DenseNetwork, activate, activate_backward
from support import relative_error

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def naive(row: list[float], activation: Activation) -> list[float]:
    half = len(row) // 2
    match activation:
        case "swiglu":
            return [silu(g) * u for g, u in zip(row[:half], row[half:], strict=True)]
        case "geglu":
            return [gelu(g) * u for g, u in zip(row[:half], row[half:], strict=True)]
        case "gelu":
            return [gelu(x) for x in row]
        case "relu":
            return [max(x, 0.0) for x in row]
        case "squared_relu":
            return [max(x, 0.0) ** 2 for x in row]


def pre_activations(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_equals_its_formula(activation: Activation) -> None:
    h = pre_activations()
    expected = torch.tensor([naive(row, activation) for row in h.tolist()], dtype=torch.float64)
    assert relative_error(activate(h, activation), expected) < 1e-14


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_written_backward_equals_autograd(activation: Activation, dtype: torch.dtype) -> None:
    h = pre_activations(dtype).requires_grad_()
    a = activate(h, activation)
    grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    a.backward(grad)
    recomputed, grad_h = activate_backward(h.detach(), grad, activation)
    tolerance = 8 * torch.finfo(dtype).eps
    assert h.grad is not None
    assert grad_h.dtype == dtype
    assert relative_error(recomputed, a) < tolerance
    assert relative_error(grad_h, h.grad) < tolerance


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_written_backward_leaves_its_inputs_alone(activation: Activation) -> None:
    h = pre_activations()
    grad = activate(h, activation)
    before = h.clone(), grad.clone()
    activate_backward(h, grad, activation)
    assert torch.equal(h, before[0])
    assert torch.equal(grad, before[1])


@pytest.mark.parametrize("activation", ["relu", "squared_relu"])
def test_gradient_at_zero_is_zero(activation: Activation) -> None:
    _, grad_h = activate_backward(torch.zeros(1, 3), torch.ones(1, 3), activation)
    assert torch.equal(grad_h, torch.zeros(1, 3))


def network(up: Tensor, down: Tensor, activation: Activation) -> DenseNetwork:
    built = DenseNetwork(down.shape[0], down.shape[1], activation)
    built.load_state_dict({"up.weight": up, "down.weight": down})
    return built


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_is_up_activation_down(activation: Activation) -> None:
    generator = torch.Generator().manual_seed(2)
    up_rows = 6 * (2 if activation in GATED else 1)
    x, up, down = (torch.randn(s, generator=generator) for s in ((2, 3, 4), (up_rows, 4), (4, 6)))
    rows = [naive(row, activation) for row in (x.double().flatten(0, 1) @ up.double().T).tolist()]
    expected = (torch.tensor(rows, dtype=torch.float64) @ down.double().T).view(2, 3, 4)
    assert relative_error(network(up, down, activation)(x), expected) < 1e-6


def test_feed_forward_in_bfloat16_gives_master_weights_float32_gradients() -> None:
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    built = network(torch.randn(12, 4), torch.randn(4, 6), "swiglu")
    y = built(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert [w.grad.dtype for w in built.parameters() if w.grad is not None] == [torch.float32] * 2
    assert relative_error(y, built(x.float())) < 0.02
