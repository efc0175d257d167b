from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from consilium.config.feed_forward import GATED, Activation
from consilium.config.moe import MoE
from consilium.config.router import Router, TopK
from consilium.moe.experts import Experts
from consilium.moe.types import LayerMode, LayerObserver, Routing, Rows, Tokens
from consilium.ops.feed_forward import activate
from consilium.ops.grouped import Backend
from support import relative_error

COUNTS = (3, 0, 7, 1)
HIDDEN = 8
BACKENDS: tuple[Backend | None, ...] = (*get_args(Backend), None)


class Recorder:
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Rows, Tensor, Tensor]] = []

    def routing(self, layer: int, routing: Routing, tokens: Tokens) -> None:
        raise AssertionError

    def rows(self, layer: int, rows: Rows, hidden_RF: Tensor, output_RD: Tensor) -> None:
        self.seen.append((layer, rows, hidden_RF, output_RD))


MODES = (LayerMode(), LayerMode(observer=LayerObserver(Recorder(), 0)))


def built(activation: Activation = "swiglu", backend: Backend | None = None) -> Experts:
    config = MoE(experts=len(COUNTS), width=16, activation=activation, router=Router(select=TopK(k=2)))
    experts = Experts(config, HIDDEN, backend=backend)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(generator=generator)
    return experts


def some_rows(counts: tuple[int, ...] = COUNTS) -> Rows:
    generator = torch.Generator().manual_seed(1)
    return Rows(torch.randn(sum(counts), HIDDEN, generator=generator).requires_grad_(), counts)


def naive(experts: Experts, rows: Rows) -> Tensor:
    """One row at a time, each through the network of the expert that owns it."""
    owner = [e for e, count in enumerate(rows.counts_E) for _ in range(count)]
    return torch.stack(
        [
            experts.down[e] @ activate(experts.up[e] @ row, experts.activation)
            for e, row in zip(owner, rows.x_RD, strict=True)
        ]
    )


def gradients(y: Tensor, experts: Experts, rows: Rows) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.sin().sum(), (rows.x_RD, experts.up, experts.down))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES, ids=["plain", "observed"])
def test_each_row_goes_through_its_own_expert(backend: Backend | None, mode: LayerMode) -> None:
    experts, rows = built(backend=backend), some_rows()
    y, expected = experts(rows, mode), naive(experts, rows)
    assert relative_error(y, expected) < 1e-6
    pairs = zip(gradients(y, experts, rows), gradients(expected, experts, rows), strict=True)
    assert all(relative_error(got, wanted) < 1e-5 for got, wanted in pairs)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_parameters_are_stacked_with_gate_and_up_together(activation: Activation) -> None:
    experts = built(activation)
    shapes = {name: tuple(weight.shape) for name, weight in experts.state_dict().items()}
    assert shapes == {"up": (4, 32 if activation in GATED else 16, HIDDEN), "down": (4, HIDDEN, 16)}
    rows = some_rows()
    assert relative_error(experts(rows, LayerMode()), naive(experts, rows)) < 1e-6


def test_observer_sees_rows_hidden_activations_and_outputs_in_the_graph() -> None:
    experts, rows, recorder = built(), some_rows(), Recorder()
    y = experts(rows, LayerMode(observer=LayerObserver(recorder, 5)))
    ((layer, seen, hidden, output),) = recorder.seen
    assert layer == 5
    assert seen is rows
    assert output is y
    assert hidden.shape == (sum(COUNTS), 16)
    (grad_hidden,) = torch.autograd.grad(y.sum(), hidden)
    owner = [e for e, count in enumerate(COUNTS) for _ in range(count)]
    assert relative_error(grad_hidden, torch.stack([experts.down[e].sum(0) for e in owner])) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES, ids=["plain", "observed"])
def test_idle_experts_get_zero_gradients_even_where_all_are_idle(
    backend: Backend | None, mode: LayerMode
) -> None:
    experts, rows = built(backend=backend), some_rows((0, 0, 0, 0))
    y = experts(rows, mode)
    y.sum().backward()
    assert y.shape == (0, HIDDEN)
    for weight in experts.parameters():
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert rows.x_RD.grad is not None
    assert rows.x_RD.grad.shape == (0, HIDDEN)


@pytest.mark.parametrize("mode", MODES, ids=["plain", "observed"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bfloat16_rows_compute_in_bfloat16_and_gradients_keep_the_weights_dtype(
    mode: LayerMode, weights: torch.dtype
) -> None:
    experts, rows = built(), some_rows()
    exact = naive(experts, rows)
    low = Rows(rows.x_RD.detach().to(torch.bfloat16), COUNTS)
    experts = experts.to(weights)
    y = experts(low, mode)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert relative_error(y, exact) < 0.02
    assert [weight.grad.dtype for weight in experts.parameters() if weight.grad is not None] == [weights] * 2


def test_recomputation_gives_the_same_gradients() -> None:
    experts, rows = built(), some_rows()
    plain = gradients(experts(rows, LayerMode()), experts, rows)
    again = checkpoint(lambda x: experts(Rows(x, COUNTS), LayerMode()), rows.x_RD, use_reentrant=False)
    assert isinstance(again, Tensor)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(again, experts, rows), strict=True))
