"""Jacobs, Jordan, Nowlan and Hinton 1991: the three errors, their gradients, and what they lead to."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.moe.adaptive_mixture import (
    AdaptiveMixture,
    Unit,
    competitive_error,
    cooperative_error,
    log_likelihood_error,
)
from consilium.moe.types import LayerMode
from moe.cases import tokens
from reference import jacobs
from support import relative_error

CASES, EXPERTS, OUTPUTS = 5, 4, 3
Error = Callable[[Tensor, Tensor, Tensor], Tensor]

every_error = pytest.mark.parametrize("error", [cooperative_error, competitive_error, log_likelihood_error])


def opinions(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(CASES, EXPERTS, generator=generator, dtype=torch.float64).requires_grad_()
    outputs = torch.randn(CASES, EXPERTS, OUTPUTS, generator=generator, dtype=torch.float64).requires_grad_()
    return logits, outputs, torch.randn(CASES, OUTPUTS, generator=generator, dtype=torch.float64)


def test_log_likelihood_gradients_are_prior_minus_posterior_and_posterior_times_residual() -> None:
    logits, outputs, target = opinions()
    loss = log_likelihood_error(logits, outputs, target) * CASES
    to_logits, to_outputs = torch.autograd.grad(loss, (logits, outputs))
    residual = target[:, None] - outputs.detach()
    prior = logits.detach().softmax(dim=1)
    joint = prior * torch.exp(-0.5 * residual.square().sum(dim=2))
    posterior = joint / joint.sum(dim=1, keepdim=True)
    assert relative_error(to_logits, prior - posterior) < 1e-12
    assert relative_error(to_outputs, -posterior[:, :, None] * residual) < 1e-12
    assert relative_error(loss, -joint.sum(dim=1).log().sum()) < 1e-12


def test_competitive_gradients_scale_each_residual_by_the_prior() -> None:
    logits, outputs, target = opinions()
    (to_outputs,) = torch.autograd.grad(competitive_error(logits, outputs, target) * CASES, outputs)
    prior = logits.detach().softmax(dim=1)
    assert relative_error(to_outputs, -2 * prior[:, :, None] * (target[:, None] - outputs.detach())) < 1e-12


def test_cooperative_gradients_all_see_the_residual_of_the_blend() -> None:
    logits, outputs, target = opinions()
    (to_outputs,) = torch.autograd.grad(cooperative_error(logits, outputs, target) * CASES, outputs)
    prior = logits.detach().softmax(dim=1)
    residual = target - (prior[:, :, None] * outputs.detach()).sum(dim=1)
    assert relative_error(to_outputs, -2 * prior[:, :, None] * residual[:, None]) < 1e-12


def test_competition_moves_the_gate_by_how_much_an_expert_beats_the_blend_of_errors() -> None:
    logits, outputs, target = opinions()
    (to_logits,) = torch.autograd.grad(competitive_error(logits, outputs, target) * CASES, logits)
    prior = logits.detach().softmax(dim=1)
    distance = (target[:, None] - outputs.detach()).square().sum(dim=2)
    mean = (prior * distance).sum(dim=1, keepdim=True)
    assert relative_error(to_logits, prior * (distance - mean)) < 1e-12


@every_error
def test_gradients_match_finite_differences(error: Error) -> None:
    logits, outputs, target = opinions(1)
    assert torch.autograd.gradcheck(lambda z, o: error(z, o, target), (logits, outputs))


@every_error
def test_errors_and_gradients_are_those_of_the_reference_one_case_at_a_time(error: Error) -> None:
    logits, outputs, target = opinions(2)
    obvious = getattr(jacobs, error.__name__.removesuffix("_error"))
    expected = torch.stack([obvious(*case) for case in zip(logits, outputs, target, strict=True)]).mean()
    actual = error(logits, outputs, target)
    assert relative_error(actual, expected) < 1e-12
    wanted = torch.autograd.grad(expected, (logits, outputs))
    for mine, theirs in zip(torch.autograd.grad(actual, (logits, outputs)), wanted, strict=True):
        assert relative_error(mine, theirs) < 1e-12


@given(st.integers(0, 10**6), st.floats(0.01, 30), st.integers(1, 6))
def test_the_three_errors_are_ordered_as_convexity_orders_them(seed: int, scale: float, experts: int) -> None:
    """A blend is no worse than its experts on average, and a mixture no less likely than on average."""
    generator = torch.Generator().manual_seed(seed)
    logits, outputs, target = (
        scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((CASES, experts), (CASES, experts, OUTPUTS), (CASES, OUTPUTS))
    )
    competitive = competitive_error(logits, outputs, target)
    nearest = (target[:, None] - outputs).square().sum(dim=2).amin(dim=1).mean()
    room = 1e-9 * scale**2
    assert cooperative_error(logits, outputs, target) <= competitive + room
    assert nearest / 2 - room <= log_likelihood_error(logits, outputs, target) <= competitive / 2 + room


@every_error
@given(order=st.permutations(range(EXPERTS)))
def test_no_expert_has_a_place_of_its_own(error: Error, order: list[int]) -> None:
    logits, outputs, target = opinions(3)
    assert relative_error(error(logits[:, order], outputs[:, order], target), error(*opinions(3))) < 1e-12


def test_far_targets_do_not_underflow() -> None:
    """The printed form takes the logarithm of zero; the likelihoods' ratios decide all the same."""
    logits, outputs, target = opinions()
    far = target + 1e3
    assert all(jacobs.log_likelihood(*case).isinf() for case in zip(logits, outputs, far, strict=True))
    loss = log_likelihood_error(logits, outputs, far) * CASES
    to_logits, to_outputs = torch.autograd.grad(loss, (logits, outputs))
    residual, prior = far[:, None] - outputs.detach(), logits.detach().softmax(dim=1)
    posterior = (prior.log() - residual.square().sum(dim=2) / 2).softmax(dim=1)
    assert relative_error(to_logits, prior - posterior) < 1e-12
    assert relative_error(to_outputs, -posterior[:, :, None] * residual) < 1e-12


def test_far_targets_have_a_whole_posterior_in_float32_too() -> None:
    logits, outputs, target = (part.detach().float().requires_grad_() for part in opinions())
    loss = log_likelihood_error(logits, outputs, target.detach() + 1e3) * CASES
    (to_logits,) = torch.autograd.grad(loss, logits)
    posterior = logits.detach().softmax(dim=1) - to_logits
    assert loss.isfinite()
    assert relative_error(posterior.sum(dim=1), torch.ones(CASES)) < 1e-6


def test_a_seed_is_a_start_and_reset_returns_to_it() -> None:
    first, second, other = (AdaptiveMixture(3, 2, EXPERTS, seed=seed) for seed in (1, 1, 2))
    start = {name: value.clone() for name, value in first.state_dict().items()}
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in start.items())
    assert not torch.equal(first.weight, other.weight)
    assert not torch.equal(first.weight[0], first.weight[1])
    assert not first.bias.any()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
    first.reset(1)
    assert all(torch.equal(value, start[name]) for name, value in first.state_dict().items())


@every_error
@pytest.mark.parametrize("unit", ["linear", "logistic"])
def test_a_mixture_and_its_gradients_are_the_references(error: Error, unit: Unit) -> None:
    """Gate and experts are maps of one input; the gate computes in float32."""
    mixture, generator = AdaptiveMixture(3, 2, EXPERTS, unit=unit, seed=4), torch.Generator().manual_seed(0)
    with torch.no_grad():
        mixture.bias.normal_(generator=generator)
    x, target = torch.randn(7, 3, generator=generator), torch.randn(7, 2, generator=generator)
    said = mixture(x, tokens(7), LayerMode())
    error(said.routing.logits_TE, said.output_TEO, target).backward()
    twin = {name: p.detach().double().requires_grad_() for name, p in mixture.named_parameters()}
    gate, obvious = "router.projection", getattr(jacobs, error.__name__.removesuffix("_error"))
    losses = []
    for x_I, target_O, p_E in zip(x.double(), target.double(), said.routing.scores_TE, strict=True):
        logits = twin[f"{gate}.weight"] @ x_I + twin[f"{gate}.bias"]
        outputs = torch.stack([twin["weight"][e] @ x_I + twin["bias"][e] for e in range(EXPERTS)])
        losses.append(obvious(logits, outputs if unit == "linear" else outputs.sigmoid(), target_O))
        assert relative_error(p_E, logits.softmax(0)) < 1e-6
    torch.stack(losses).mean().backward()
    for name, parameter in mixture.named_parameters():
        mine, theirs = parameter.grad, twin[name].grad
        assert mine is not None
        assert theirs is not None
        assert relative_error(mine, theirs) < 1e-5, name


def test_the_blend_is_the_sum_of_what_experts_say_weighed_by_the_gate() -> None:
    mixture, x = AdaptiveMixture(3, 2, EXPERTS, seed=4), torch.randn(7, 3, generator=torch.Generator())
    said = mixture(x, tokens(7), LayerMode())
    blend = torch.zeros(7, 2)
    for e in range(EXPERTS):
        blend += said.routing.scores_TE[:, e, None] * said.output_TEO[:, e]
    assert relative_error(said.blend_TO, blend) < 1e-6
    assert torch.equal(said.routing.load_E(), torch.full((EXPERTS,), 7))


def fit(error: Error, steps: int = 150) -> tuple[float, float]:
    """Gate entropy and mean squared error of the blend, after training on clusters with a map each."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.tensor([[4.0, 0], [-4, 0], [0, 4]])
    maps = 2 * torch.randn(3, 1, 2, generator=generator)
    which = torch.arange(90) % 3
    x = centres[which] + 0.5 * torch.randn(90, 2, generator=generator)
    target = torch.einsum("toi,ti->to", maps[which], x)
    mixture, every = AdaptiveMixture(2, 1, 3), tokens(90, sequences=1)
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.1)
    for _ in range(steps):
        said = mixture(x, every, LayerMode(training=True))
        optimizer.zero_grad()
        error(said.routing.logits_TE, said.output_TEO, target).backward()
        optimizer.step()
    said = mixture(x, every, LayerMode())
    entropy = torch.special.entr(said.routing.scores_TE.detach()).sum(dim=1).mean()
    return float(entropy), float((said.blend_TO.detach() - target).square().mean())


def test_log_likelihood_gives_each_cluster_an_expert_and_cooperation_does_not() -> None:
    sharp, error = fit(log_likelihood_error)
    blurred, _ = fit(cooperative_error)
    assert sharp < 0.1 * math.log(3)
    assert error < 0.1
    assert blurred > 2 * sharp
