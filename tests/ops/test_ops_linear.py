from __future__ import annotations

import pytest
import torch

from consilium.ops.linear import Linear
from support import relative_error


@pytest.mark.parametrize("bias", [False, True])
def test_a_float32_master_weight_computes_in_the_dtype_of_the_input(*, bias: bool) -> None:
    torch.manual_seed(0)
    linear = Linear(6, 4, bias=bias)
    torch.nn.init.normal_(linear.weight)
    if linear.bias is not None:
        torch.nn.init.normal_(linear.bias)
    x = torch.randn(3, 6)
    expected = x.double() @ linear.weight.double().T + (0 if linear.bias is None else linear.bias.double())
    assert relative_error(linear(x), expected) < 1e-6
    halved = linear(x.bfloat16())
    assert halved.dtype == torch.bfloat16
    assert relative_error(halved, expected) < 2e-2


def test_the_gradient_reaches_the_master_weight_in_its_own_dtype() -> None:
    torch.manual_seed(0)
    linear = Linear(5, 3)
    torch.nn.init.normal_(linear.weight)
    x = torch.randn(7, 5).bfloat16()
    linear(x).float().square().sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32
    expected = 2 * (x.double() @ linear.weight.double().T).T @ x.double()
    assert relative_error(linear.weight.grad, expected) < 2e-2
