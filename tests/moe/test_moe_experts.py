from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from consilium.config.feed_forward import GATED, Activation
from consilium.config.moe import MoE
from consilium.config.router import Router, TopK
from consilium.moe.experts import Experts
from consilium.moe.types import Activations, LayerMode, LayerObserver, Routing, Tokens
from consilium.ops.feed_forward import activate
from consilium.ops.grouped import Backend
from consilium.ops.rows import ByToken, Rows
from support import relative_error

COUNTS = (3, 0, 7, 1)
HIDDEN = 8
BACKENDS: tuple[Backend | None, ...] = (*get_args(Backend), None)


class Recorder:
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Rows, Activations]] = []

    def routing(self, layer: int, routing: Routing, tokens: Tokens) -> None:
        raise AssertionError

    def rows(self, layer: int, rows: Rows, activations: Activations) -> None:
        self.seen.append((layer, rows, activations))


MODES = (LayerMode(), LayerMode(observer=LayerObserver(Recorder(), 0)))


def built(activation: Activation = "swiglu", backend: Backend | None = None) -> Experts:
    config = MoE(experts=len(COUNTS), width=16, activation=activation, router=Router(select=TopK(k=2)))
    experts = Experts(config, HIDDEN, backend=backend)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(generator=generator)
    return experts


def some_rows(counts: tuple[int, ...] = COUNTS, *, on_input: bool = False) -> Rows:
    """Of seven tokens, all of which the third expert has; the last has no other."""
    generator = torch.Generator().manual_seed(1)
    token_R = torch.cat([torch.randperm(7, generator=generator)[:count].sort().values for count in counts])
    by_token = ByToken.of(token_R, token_R.argsort(stable=True), token_R.bincount(minlength=7))
    x_TD = torch.randn(7, HIDDEN, generator=generator).requires_grad_()
    weight_R = torch.randn(len(token_R), generator=generator).requires_grad_()
    return Rows(x_TD, by_token, weight_R, counts, on_input)


def naive(experts: Experts, rows: Rows) -> Tensor:
    """One row at a time, each through the network of the expert that owns it, added to its token."""
    owner = [e for e, count in enumerate(rows.counts_E) for _ in range(count)]
    y_T = [torch.zeros(HIDDEN) for _ in rows.x_TD]
    for e, t, weight in zip(owner, rows.by_token.token_R.tolist(), rows.weight_R, strict=True):
        x = rows.x_TD[t] * weight if rows.weight_on_input else rows.x_TD[t]
        y = experts.down[e] @ activate(experts.up[e] @ x, experts.activation)
        y_T[t] = y_T[t] + (y if rows.weight_on_input else y * weight)
    return torch.stack(y_T)


def gradients(y: Tensor, experts: Experts, rows: Rows) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y / 50).sin().sum(), (rows.x_TD, rows.weight_R, experts.up, experts.down))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES, ids=["plain", "observed"])
@pytest.mark.parametrize("on_input", [False, True], ids=["on output", "on input"])
def test_each_row_goes_through_its_own_expert(
    backend: Backend | None, mode: LayerMode, *, on_input: bool
) -> None:
    experts, rows = built(backend=backend), some_rows(on_input=on_input)
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
    ((layer, seen, activations),) = recorder.seen
    assert layer == 5
    assert seen is rows
    assert torch.equal(activations.input_RD, rows.x_TD[rows.by_token.token_R])
    assert torch.equal(rows.outputs(activations.output_RD), y)
    assert activations.hidden_RF.shape == (sum(COUNTS), 16)
    (grad_hidden,) = torch.autograd.grad(y.sum(), activations.hidden_RF)
    owner = [e for e, count in enumerate(COUNTS) for _ in range(count)]
    expected = torch.stack([experts.down[e].sum(0) for e in owner]) * rows.weight_R[:, None]
    assert relative_error(grad_hidden, expected) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES, ids=["plain", "observed"])
def test_idle_experts_get_zero_gradients_even_where_all_are_idle(
    backend: Backend | None, mode: LayerMode
) -> None:
    experts, rows = built(backend=backend), some_rows((0, 0, 0, 0))
    y = experts(rows, mode)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(7, HIDDEN))
    for weight in experts.parameters():
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert rows.x_TD.grad is not None
    assert torch.equal(rows.x_TD.grad, torch.zeros(7, HIDDEN))


@pytest.mark.parametrize("mode", MODES, ids=["plain", "observed"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bfloat16_rows_compute_in_bfloat16_and_gradients_keep_the_weights_dtype(
    mode: LayerMode, weights: torch.dtype
) -> None:
    experts, rows = built(), some_rows()
    exact = naive(experts, rows)
    low = replace(rows, x_TD=rows.x_TD.detach().to(torch.bfloat16).requires_grad_())
    experts = experts.to(weights)
    y = experts(low, mode)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert relative_error(y, exact) < 0.02
    assert [weight.grad.dtype for weight in experts.parameters() if weight.grad is not None] == [weights] * 2


def test_recomputation_gives_the_same_gradients() -> None:
    experts, rows = built(), some_rows()
    plain = gradients(experts(rows, LayerMode()), experts, rows)
    again = checkpoint(lambda x: experts(replace(rows, x_TD=x), LayerMode()), rows.x_TD, use_reentrant=False)
    assert isinstance(again, Tensor)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(again, experts, rows), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_nobody_asked_for_are_not_computed_and_the_others_are_the_same(
    backend: Backend | None,
) -> None:
    experts, rows = built(backend=backend), some_rows()
    every = gradients(experts(rows, LayerMode()), experts, rows)
    leaves = rows.x_TD, rows.weight_R, experts.up, experts.down
    for asked in range(1, 16):
        for place, leaf in enumerate(leaves):
            leaf.requires_grad_(bool(asked >> place & 1))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad((experts(rows, LayerMode()) / 50).sin().sum(), wanted)
        expected = [gradient for place, gradient in enumerate(every) if asked >> place & 1]
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["grouped", "padded", "loop"])
def test_what_is_kept_for_backward_does_not_grow_with_the_choices_of_a_token(backend: Backend) -> None:
    """Tokens, weights of rows, pre-activations and the matrices: nothing of size R x D."""
    kept: dict[int, int] = {}
    for k in (2, 4, 8):
        width, experts = 32 // k, 4 * k
        config = MoE(experts=experts, width=width, router=Router(select=TopK(k=k)))
        layer = Experts(config, HIDDEN, backend=backend)
        token_R = torch.arange(16 * k).reshape(k, 16).remainder(16).flatten()
        by_token = ByToken.of(token_R, token_R.argsort(stable=True), torch.full((16,), k))
        rows = Rows(
            torch.randn(16, HIDDEN).requires_grad_(),
            by_token,
            torch.ones(16 * k),
            (16 * k // experts,) * experts,
        )
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t
        ):
            layer(rows, LayerMode())
        kept[k] = sum(sizes) - 16 * k
    assert len(set(kept.values())) == 1
