"""Jacobs, Jordan, Nowlan and Hinton 1991: the three errors, their gradients, and what they lead to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from consilium.moe.adaptive_mixture import (
    AdaptiveMixture,
    competitive_error,
    cooperative_error,
    log_likelihood_error,
)
from consilium.moe.types import Mode
from moe.cases import tokens
from support import relative_error

CASES, EXPERTS, OUTPUTS = 5, 4, 3


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


@pytest.mark.parametrize("error", [cooperative_error, competitive_error, log_likelihood_error])
def test_gradients_match_finite_differences(error: object) -> None:
    logits, outputs, target = opinions(1)
    assert torch.autograd.gradcheck(lambda z, o: error(z, o, target), (logits, outputs))


def test_far_targets_do_not_underflow() -> None:
    logits, outputs, target = opinions()
    loss = log_likelihood_error(logits, outputs, target + 1e3)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (logits, outputs)))


def test_gate_and_experts_are_linear_maps_of_one_input() -> None:
    mixture = AdaptiveMixture(3, 2, EXPERTS)
    generator = torch.Generator().manual_seed(0)
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(7, 3, generator=generator)
    said = mixture(x, tokens(7), Mode())
    p = torch.softmax(x @ mixture.router.projection.weight.T + mixture.router.projection.bias, dim=1)
    blend = torch.zeros(7, 2)
    for e in range(EXPERTS):
        blend += p[:, e, None] * (x @ mixture.weight[e].T + mixture.bias[e]).detach()
    assert relative_error(said.routing.scores_TE, p) < 1e-6
    assert relative_error(said.blend_TO, blend) < 1e-5


def fit(error: object, steps: int = 150) -> tuple[float, float]:
    """Gate entropy and mean squared error of the blend, after training on clusters with a map each."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.tensor([[4.0, 0], [-4, 0], [0, 4]])
    maps = 2 * torch.randn(3, 1, 2, generator=generator)
    which = torch.arange(90) % 3
    x = centres[which] + 0.5 * torch.randn(90, 2, generator=generator)
    target = torch.einsum("toi,ti->to", maps[which], x)
    mixture, every = AdaptiveMixture(2, 1, 3), tokens(90, sequences=1)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.1)
    for _ in range(steps):
        said = mixture(x, every, Mode(training=True))
        optimizer.zero_grad()
        error(said.routing.logits_TE, said.output_TEO, target).backward()
        optimizer.step()
    said = mixture(x, every, Mode())
    entropy = torch.special.entr(said.routing.scores_TE.detach()).sum(dim=1).mean()
    return float(entropy), float((said.blend_TO.detach() - target).square().mean())


def test_log_likelihood_gives_each_cluster_an_expert_and_cooperation_does_not() -> None:
    sharp, error = fit(log_likelihood_error)
    blurred, _ = fit(cooperative_error)
    assert sharp < 0.1 * math.log(3)
    assert error < 0.1
    assert blurred > 2 * sharp
