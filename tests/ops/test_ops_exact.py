"""A gate's product keeps its float32, whatever the program around it has allowed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from consilium.moe.types import LayerMode
from consilium.ops.exact import exact_linear, no_autocast
from moe.cases import SYSTEMS, layer, tokens, vectors
from support import relative_error

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture(params=["tf32", "medium"])
def rounding(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """A program that lets products round, by the new switch of one backend or the old one of all."""
    before = [backend.fp32_precision for backend in BACKENDS]
    if request.param == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision("medium")
    yield [backend.fp32_precision for backend in BACKENDS]
    for backend, precision in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = precision


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (64, 256), (48, 256), (48,), (64, 48)
    x, weight, bias, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), grad


def test_values_and_gradients_are_those_of_float32(rounding: list[str]) -> None:
    x, weight, bias, grad = problem()
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    y, expected = exact_linear(x, weight, bias), F.linear(*exact)
    assert relative_error(y, expected) < 1e-6
    y.backward(grad)
    expected.backward(grad.double())
    for mine, theirs in zip((x, weight, bias), exact, strict=True):
        assert relative_error(mine.grad, theirs.grad) < 1e-6
    assert [backend.fp32_precision for backend in BACKENDS] == rounding


def test_a_plain_product_would_round() -> None:
    x, weight, _, _ = problem()
    torch.set_float32_matmul_precision("medium")
    try:
        error = relative_error(F.linear(x, weight), F.linear(x.double(), weight.double()))
        kept = relative_error(exact_linear(x, weight), F.linear(x.double(), weight.double()))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert kept < 1e-6
    if error < 1e-6:
        pytest.skip("this processor has no bfloat16 products to round by")
    assert error > 1e-4


@pytest.mark.usefixtures("rounding")
def test_experts_are_chosen_as_without_rounding() -> None:
    built, x_TD, every = layer(SYSTEMS["deepseek-v3"]), vectors(200), tokens(200)
    rounded = built(x_TD, every, LayerMode()).routing
    weight = built.router.projection.weight.double()
    assert relative_error(rounded.logits_TE, x_TD.double() @ weight.T) < 1e-6


def test_devices_without_autocast_need_no_guard() -> None:
    with torch.autocast("cpu", torch.bfloat16), no_autocast(torch.zeros(1)):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with no_autocast(torch.zeros(1, device="meta")):
        assert torch.zeros(1, device="meta").device.type == "meta"
