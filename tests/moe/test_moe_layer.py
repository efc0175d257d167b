"""The layer against plain loops in float64, for every system, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from consilium.config.balance import Balance, SequenceLoss, SignBias, SwitchLoss
from consilium.config.moe import MoE
from consilium.config.router import Jitter, Normalised, Raw, Router, Sigmoid, SoftmaxOfSelected, TopK
from consilium.moe.layer import MoELayer, Result
from consilium.moe.types import Activations, LayerMode, LayerObserver, Override, Routing, Tokens
from consilium.ops.rows import Rows
from moe import naive
from moe.cases import EXPERTS, HIDDEN, SYSTEMS, layer, moe, tokens, vectors
from support import relative_error

TOLERANCE = 2e-5


def gradients(built: MoELayer) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in built.named_parameters()}


def naive_twin(
    built: MoELayer, config: MoE, x_TD: Tensor, every: Tokens
) -> tuple[naive.Naive, naive.State, Tensor]:
    state = {name: value.detach().double().requires_grad_() for name, value in built.named_parameters()}
    x = x_TD.detach().double().requires_grad_()
    bias_E = built.balance.bias_E
    bias = None if bias_E is None else bias_E.double()
    return naive.run(config, state, built.router.table, x, every, bias), state, x


@pytest.mark.parametrize("count", [1, 5, 23])
@pytest.mark.parametrize("name", SYSTEMS)
def test_layer_equals_plain_loops_in_values_and_all_gradients(name: str, count: int) -> None:
    config = SYSTEMS[name]
    built, every = layer(config), tokens(count, padding=count // 4)
    x_TD = vectors(count).requires_grad_()
    result = built(x_TD, every, LayerMode())
    expected, state, x = naive_twin(built, config, x_TD, every)
    y = torch.stack(expected.y)
    assert relative_error(result.y_TD, y) < TOLERANCE

    grad_TD = vectors(count, seed=9)
    result.y_TD.backward(grad_TD)
    y.backward(grad_TD.double())
    assert relative_error(x_TD.grad, x.grad) < TOLERANCE
    for key, gradient in gradients(built).items():
        wanted = state[key].grad
        assert (
            relative_error(gradient, torch.zeros_like(state[key]) if wanted is None else wanted) < TOLERANCE
        ), key


@pytest.mark.parametrize("name", SYSTEMS)
def test_routing_and_loads_equal_plain_loops(name: str) -> None:
    config = SYSTEMS[name]
    built, every, x_TD = layer(config), tokens(23, padding=4), vectors(23)
    result = built(x_TD, every, LayerMode())
    expected, _, _ = naive_twin(built, config, x_TD, every)
    routing = result.routing
    for t in range(23):
        kept = routing.keep_TK[t]
        assert routing.experts_TK[t][kept].tolist() == expected.admitted[t]
        weighed = routing.weights_TK[t] != 0
        assert routing.experts_TK[t][weighed].tolist() == list(expected.chosen[t])
        if expected.chosen[t]:
            weights = torch.stack(list(expected.chosen[t].values()))
            assert relative_error(routing.weights_TK[t][weighed], weights) < TOLERANCE
    load = torch.tensor([sum(e in order for order in expected.admitted) for e in range(EXPERTS)])
    wanted = torch.tensor([sum(e in order for order in expected.chosen) for e in range(EXPERTS)])
    assert torch.equal(result.report.load_E, load)
    assert torch.equal(result.report.wanted_E, wanted)
    assert int(result.report.dropped) == int(wanted.sum() - load.sum())
    assert int(result.report.tokens) == 19


@pytest.mark.parametrize("weight", [Raw(), Normalised(), SoftmaxOfSelected()], ids=lambda rule: rule.kind)
def test_keeping_every_expert_equals_the_dense_mixture(weight: Raw | Normalised | SoftmaxOfSelected) -> None:
    built = layer(moe(Router(select=TopK(k=EXPERTS), weight=weight)))
    x_TD = vectors(9).requires_grad_()
    y_TD = built(x_TD, tokens(9), LayerMode()).y_TD
    p_TE = torch.softmax(x_TD @ built.router.projection.weight.T, dim=1)
    gate_TEF, up_TEF = torch.einsum("td,egd->teg", x_TD, built.experts.up).chunk(2, dim=2)
    o_TED = torch.einsum("tef,edf->ted", torch.nn.functional.silu(gate_TEF) * up_TEF, built.experts.down)
    dense_TD = torch.einsum("te,ted->td", p_TE, o_TED)
    assert relative_error(y_TD, dense_TD) < TOLERANCE
    (sparse,) = torch.autograd.grad(y_TD.square().sum(), x_TD)
    (dense,) = torch.autograd.grad(dense_TD.square().sum(), x_TD)
    assert relative_error(sparse, dense) < TOLERANCE


def test_tokens_without_experts_get_nothing_from_a_latent_space() -> None:
    built = layer(SYSTEMS["latent, weights on input"])
    mode = LayerMode(override=Override(mute_TE=torch.ones(1, EXPERTS, dtype=torch.bool)))
    assert torch.equal(built(vectors(5), tokens(5), mode).y_TD, torch.zeros(5, HIDDEN))


def test_rows_in_a_latent_space_are_as_narrow_as_it() -> None:
    built, x_TD, seen = layer(SYSTEMS["latent"]), vectors(9), Widths()
    built(x_TD, tokens(9), LayerMode(observer=LayerObserver(seen, 0)))
    assert seen.widths == [(5, 5)]


class Widths:
    """Notes how wide rows are on their way to the experts and back."""

    def __init__(self) -> None:
        self.widths: list[tuple[int, int]] = []

    def routing(self, layer: int, routing: Routing, tokens: Tokens) -> None:
        pass

    def rows(self, layer: int, rows: Rows, activations: Activations) -> None:
        self.widths.append((activations.input_RD.shape[1], activations.output_RD.shape[1]))


def noisy_v3() -> MoE:
    router = Router(noise=Jitter(epsilon=0.2), score=Sigmoid(), offset="scores", select=TopK(k=2))
    losses = (SwitchLoss(coefficient=1.0), SequenceLoss(coefficient=1.0))
    return moe(router, balance=Balance(losses=losses, bias=SignBias()))


def pass_with_gradients(built: MoELayer, *, recompute: bool) -> tuple[Result, dict[str, Tensor], Tensor]:
    built.zero_grad()
    x_TD = vectors(31).requires_grad_()
    every, mode = tokens(31, padding=3), LayerMode(training=True)
    torch.manual_seed(7)
    if recompute:
        result = checkpoint(built, x_TD, every, mode, use_reentrant=False)
    else:
        result = built(x_TD, every, mode)
    (result.y_TD.square().sum() + sum(result.report.losses.values())).backward()
    assert x_TD.grad is not None
    return result, gradients(built), x_TD.grad


def test_recomputation_repeats_reports_and_gradients_bit_for_bit() -> None:
    built = layer(noisy_v3())
    plain, plain_grads, plain_dx = pass_with_gradients(built, recompute=False)
    again, again_grads, again_dx = pass_with_gradients(built, recompute=True)
    assert torch.equal(plain.y_TD, again.y_TD)
    assert torch.equal(plain_dx, again_dx)
    for name in plain_grads:
        assert torch.equal(plain_grads[name], again_grads[name]), name
    assert torch.equal(plain.report.load_E, again.report.load_E)
    assert torch.equal(plain.report.wanted_E, again.report.wanted_E)
    assert torch.equal(plain.report.entropy, again.report.entropy)
    for name, value in plain.report.losses.items():
        assert torch.equal(value, again.report.losses[name]), name


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_pass_leaves_no_trace_in_the_layer(name: str) -> None:
    built, every, x_TD = layer(SYSTEMS[name]), tokens(23), vectors(23)
    before = {key: value.clone() for key, value in built.state_dict().items()}
    mode = LayerMode(training=True)
    torch.manual_seed(3)
    first = built(x_TD, every, mode)
    torch.manual_seed(3)
    second = built(x_TD, every, mode)
    assert torch.equal(first.y_TD, second.y_TD)
    assert torch.equal(first.report.load_E, second.report.load_E)
    assert all(torch.equal(value, before[key]) for key, value in built.state_dict().items())


@pytest.mark.parametrize("name", SYSTEMS)
def test_idle_experts_get_zero_gradients(name: str) -> None:
    built = layer(SYSTEMS[name])
    result = built(vectors(1), tokens(1), LayerMode())
    result.y_TD.sum().backward()
    idle_E = result.report.load_E == 0
    for parameter in (built.experts.up, built.experts.down):
        assert parameter.grad is not None
        assert not parameter.grad[idle_E].any()


@pytest.mark.parametrize("name", ["deepseek-v3", "gshard", "expert choice", "relu", "qwen2-moe"])
def test_a_batch_of_padding_gives_only_the_shared_output_and_finite_gradients(name: str) -> None:
    built = layer(SYSTEMS[name])
    x_TD = vectors(6).requires_grad_()
    result = built(x_TD, tokens(6, padding=6), LayerMode(training=True))
    assert torch.equal(result.y_TD, built.shared(x_TD))
    assert not result.report.load_E.any()
    (result.y_TD.sum() + sum(result.report.losses.values())).backward()
    assert all(g.isfinite().all() for g in gradients(built).values())


def test_an_empty_batch_is_a_batch() -> None:
    built = layer(SYSTEMS["deepseek-v3"])
    result = built(vectors(0), tokens(0), LayerMode(training=True))
    assert result.y_TD.shape == (0, HIDDEN)
    assert int(result.report.load_E.sum()) == 0
    assert float(result.report.entropy) == 0
