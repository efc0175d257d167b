"""The router: precision, ties, bias, groups, noise, NaN, and weights that stay finite."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.config.router import (
    ClampedSum,
    ExpertChoice,
    Groups,
    Jitter,
    LearnedNoise,
    Normalised,
    Raw,
    Relu,
    Score,
    Sigmoid,
    SoftmaxOfSelected,
    SqrtSoftplus,
    Standardise,
    Threshold,
    TopK,
    TopP,
    Uniform,
    Weight,
)
from consilium.config.router import Router as RouterConfig
from consilium.moe.routing.gate import Gate
from consilium.moe.routing.router import Router
from consilium.moe.routing.score import score, transform
from consilium.moe.routing.select import Choice
from consilium.moe.routing.weigh import weigh
from consilium.moe.types import LayerMode, Routing
from moe.cases import EXPERTS, HIDDEN, SYSTEMS, V2, V3, layer, moe, tokens, vectors
from support import relative_error

SCORES = tuple(member() for member in get_args(get_args(Score)[0]))
WEIGHTS = (
    Raw(),
    Normalised(),
    Normalised(epsilon=0.0),
    ClampedSum(minimum=0.1),
    SoftmaxOfSelected(),
    Uniform(),
)


def router(config: RouterConfig, seed: int = 0) -> Router:
    return layer(moe(config), seed).router


def same(one: Routing, other: Routing) -> bool:
    names = ("logits_TE", "scores_TE", "experts_TK", "weights_TK", "keep_TK", "clean_TE")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize("name", [name for name in SYSTEMS if "hash" not in name and name != "relu"])
def test_constant_logits_choose_the_first_experts(name: str) -> None:
    config = SYSTEMS[name].router
    built = router(config)
    for gate in (built.projection, built.primary):
        if gate is not None:
            torch.nn.init.zeros_(next(gate.parameters()))
    routing = built(vectors(3), torch.zeros(EXPERTS), tokens(3), LayerMode())
    first = list(range(routing.experts_TK.shape[1]))
    if name == "hierarchical, wide groups":
        first = [0, 1, 2, 4, 5, 6]
    assert routing.experts_TK.tolist() == [first] * 3


@pytest.mark.parametrize(
    "groups", [None, V2.select.groups, V3.select.groups], ids=["plain", "max", "top2_sum"]
)
@given(seed=st.integers(0, 10**6), shift=st.floats(-100, 100), spread=st.floats(0, 2))
def test_a_constant_in_the_bias_never_changes_the_choice(
    groups: Groups | None, seed: int, shift: float, spread: float
) -> None:
    """A mask of 0.0 instead of -inf fails here as soon as all biased scores are negative."""
    config = RouterConfig(score=Sigmoid(), offset="scores", select=TopK(k=3, groups=groups))
    built, x_TD = router(config), vectors(16, seed)
    bias_E = spread * torch.randn(EXPERTS, generator=torch.Generator().manual_seed(seed))
    plain = built(x_TD, bias_E, tokens(16), LayerMode())
    values_TE = (plain.scores_TE + bias_E).sort(dim=1).values
    # A large constant rounds away small differences: only tokens without near ties are promised anything.
    clear_T = values_TE.diff(dim=1).amin(dim=1) > 1e-3
    shifted = built(x_TD, bias_E + shift, tokens(16), LayerMode())
    assert torch.equal(plain.experts_TK[clear_T], shifted.experts_TK[clear_T])
    assert torch.equal(plain.weights_TK[clear_T], shifted.weights_TK[clear_T])


@given(seed=st.integers(0, 10**6), mean=st.sampled_from([-5.0, -1.0, 0.0, 3.0]))
def test_choices_stay_inside_the_best_groups(seed: int, mean: float) -> None:
    built = router(V3)
    bias_E = mean + torch.rand(EXPERTS, generator=torch.Generator().manual_seed(seed))
    routing = built(vectors(16, seed), bias_E, tokens(16), LayerMode())
    group_TG = (routing.scores_TE + bias_E).view(16, 4, 2).sum(dim=2)
    best_TG = group_TG.argsort(dim=1, descending=True)[:, :2]
    assert ((routing.experts_TK // 2)[:, :, None] == best_TG[:, None, :]).any(dim=2).all()
    assert routing.keep_TK.all()


def test_the_bias_selects_but_never_weighs() -> None:
    built, x_TD = router(V3), vectors(9)
    bias_E = torch.linspace(-3, 3, EXPERTS).requires_grad_()
    routing = built(x_TD, bias_E, tokens(9), LayerMode())
    chosen_TK = routing.scores_TE.gather(1, routing.experts_TK)
    expected_TK = chosen_TK / chosen_TK.sum(dim=1, keepdim=True) * 2.5
    assert relative_error(routing.weights_TK, expected_TK) < 1e-6
    (gradient,) = torch.autograd.grad(routing.weights_TK.square().sum(), bias_E, allow_unused=True)
    assert gradient is None


def test_v2_and_v3_group_scores_choose_differently() -> None:
    logits = torch.tensor([[5.0, -9, 4, 4, 0, 0, -1, -1]])
    built = {}
    for rule in ("max", "top2_sum"):
        select = TopK(k=2, groups=Groups(count=4, keep=1, score=rule))
        config = RouterConfig(score=Sigmoid(), select=select, weight=Raw())
        made = Router(config, EXPERTS, EXPERTS)
        torch.nn.init.eye_(made.projection.weight)
        built[rule] = made(logits, None, tokens(1), LayerMode()).experts_TK.tolist()
    assert built == {"max": [[0, 1]], "top2_sum": [[2, 3]]}


@pytest.mark.parametrize("name", ["deepseek-v3", "mixtral", "llama-moe", "skywork", "shazeer"])
def test_arithmetic_is_float32_whatever_the_model_and_autocast_say(name: str) -> None:
    config = SYSTEMS[name].router
    built, x_TD = router(config).bfloat16(), vectors(33).bfloat16()
    bias_E = torch.linspace(-1, 0, EXPERTS)
    twin = router(config)
    twin.load_state_dict({key: value.float() for key, value in built.state_dict().items()})
    expected = twin(x_TD.float(), bias_E, tokens(33), LayerMode())
    assert same(built(x_TD, bias_E, tokens(33), LayerMode()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(built(x_TD, bias_E, tokens(33), LayerMode()), expected)
    for field in fields(Routing):
        value = getattr(expected, field.name)
        assert not isinstance(value, torch.Tensor) or value.dtype in {torch.float32, torch.int64, torch.bool}


@pytest.mark.parametrize("noise", [Jitter(epsilon=0.3), LearnedNoise()], ids=["jitter", "learned"])
def test_noise_acts_in_training_only_and_follows_the_generator(noise: Jitter | LearnedNoise) -> None:
    built, x_TD = router(RouterConfig(noise=noise, select=TopK(k=2))), vectors(20)
    quiet = built(x_TD, None, tokens(20), LayerMode())
    assert same(quiet, built(x_TD, None, tokens(20), LayerMode()))
    noisy = [
        built(x_TD, None, tokens(20), LayerMode(training=True, generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    ]
    assert same(noisy[0], noisy[1])
    assert not torch.equal(noisy[0].logits_TE, noisy[2].logits_TE)
    assert not torch.equal(noisy[0].logits_TE, quiet.logits_TE)


def test_jitter_stays_in_its_bounds_and_never_reaches_the_input() -> None:
    built = Router(RouterConfig(noise=Jitter(epsilon=0.01), select=TopK(k=2)), EXPERTS, EXPERTS)
    torch.nn.init.eye_(built.projection.weight)
    x_TD = torch.ones(500, EXPERTS)
    logits_TE = built(x_TD, None, tokens(500), LayerMode(training=True)).logits_TE.detach()
    assert 0.99 <= float(logits_TE.min()) < 0.991
    assert 1.009 < float(logits_TE.max()) <= 1.01
    assert torch.equal(x_TD, torch.ones(500, EXPERTS))


def test_learned_noise_has_the_stated_deviation() -> None:
    built = Router(RouterConfig(noise=LearnedNoise(floor=0.25), select=TopK(k=2)), HIDDEN, EXPERTS)
    mode = LayerMode(training=True, generator=torch.Generator().manual_seed(0))
    routing = built(vectors(4000), None, tokens(4000, sequences=1), mode)
    assert not routing.clean_TE.any()
    drawn = (routing.logits_TE / (0.25 + math.log(2))).detach()
    assert abs(float(drawn.mean())) < 0.02
    assert abs(float(drawn.std()) - 1) < 0.02


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_nan_reaches_the_output(name: str) -> None:
    """Hidden by a comparison, it would turn into a token without experts that no guard can see."""
    built, x_TD = layer(SYSTEMS[name]), vectors(8)
    x_TD[0, 0] = torch.nan
    result = built(x_TD, tokens(8), LayerMode())
    assert result.y_TD[0].isnan().all()
    assert not result.y_TD[1:].isnan().any()
    # Without a gate there are no scores that could be NaN.
    assert result.report.entropy.isnan() == (name != "hash without a gate")


@pytest.mark.parametrize("kind", SCORES, ids=lambda kind: kind.kind)
def test_scores_and_their_gradients_are_finite_for_any_finite_logit(kind: Score) -> None:
    logits_TE = torch.tensor([[-1e4, -200.0, -88.0, 0.0, 30.0, 88.0, 200.0, 1e4]]).requires_grad_()
    scores_TE = score(logits_TE, kind)
    scores_TE.sum().backward()
    assert scores_TE.isfinite().all()
    assert logits_TE.grad is not None
    assert logits_TE.grad.isfinite().all()


def test_standardised_logits_have_the_asked_deviation_and_finite_gradients_at_zero() -> None:
    z_TE = 3 + 7 * vectors(5, hidden=EXPERTS)
    standard_TE = transform(z_TE, (Standardise(scale=2.0),))
    assert relative_error(standard_TE.std(dim=1), torch.full((5,), 2.0)) < 1e-5
    assert float(standard_TE.mean(dim=1).abs().max()) < 1e-5
    zero_TE = torch.zeros(2, EXPERTS, requires_grad=True)
    transform(zero_TE, (Standardise(),)).square().sum().backward()
    assert zero_TE.grad is not None
    assert zero_TE.grad.isfinite().all()


@pytest.mark.parametrize("rule", WEIGHTS, ids=repr)
@pytest.mark.parametrize("kind", [Sigmoid(), Relu(), SqrtSoftplus()], ids=lambda kind: kind.kind)
def test_unused_choices_weigh_zero_with_finite_gradients(rule: Weight, kind: Score) -> None:
    logits_TE = torch.tensor([[-300.0, -200, -150, -120], [1, 2, 3, 4], [-1, -2, 1, 2]]).requires_grad_()
    used_TK = torch.tensor([[True, True], [False, False], [True, False]])
    choice = Choice(torch.tensor([[0, 1], [2, 3], [3, 0]]), used_TK, used_TK)
    config = RouterConfig(select=TopK(k=2), weight=rule, scale=2.0)
    weights_TK = weigh(config, logits_TE, score(logits_TE, kind), choice)
    assert weights_TK.isfinite().all()
    assert not weights_TK[~used_TK].any()
    if weights_TK.requires_grad:
        (weights_TK * torch.tensor([3.0, 5.0])).sum().backward()
        assert logits_TE.grad is not None
        assert logits_TE.grad.isfinite().all()
        assert not logits_TE.grad[1].any()


@pytest.mark.parametrize("name", ["deepseek-v3", "mixtral", "ernie", "relu"])
def test_weights_sum_to_what_the_rule_says(name: str) -> None:
    config = SYSTEMS[name].router
    routing = router(config)(vectors(50), torch.zeros(EXPERTS), tokens(50), LayerMode())
    total_T = routing.weights_TK.sum(dim=1)
    chosen_T = routing.scores_TE.gather(1, routing.experts_TK).masked_fill(~routing.keep_TK, 0).sum(dim=1)
    match config.weight:
        case Normalised() | SoftmaxOfSelected():
            expected_T = torch.full((50,), config.scale)
        case ClampedSum(minimum=minimum):
            expected_T = chosen_T / chosen_T.clamp(min=minimum)
        case _:
            expected_T = chosen_T
    assert relative_error(total_T, expected_T) < 1e-6


@pytest.mark.parametrize("select", [ExpertChoice(), Threshold(most=3), TopP(p=0.9, most=EXPERTS), TopK(k=2)])
def test_preferences_fall(select: ExpertChoice | Threshold | TopP | TopK) -> None:
    routing = router(RouterConfig(select=select, weight=Raw()))(vectors(20), None, tokens(20), LayerMode())
    chosen_TK = routing.scores_TE.gather(1, routing.experts_TK)
    assert (chosen_TK.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 17, 127])
@pytest.mark.parametrize(("distinct", "copies"), [(2, 2), (3, 5), (5, 3), (7, 9), (8, 8), (3, 1)])
def test_equal_rows_of_a_gate_give_logits_equal_to_the_last_bit(
    tokens: int, distinct: int, copies: int
) -> None:
    torch.manual_seed(0)
    for inputs in (17, 100, 577, 1000):
        gate = Gate(inputs, distinct * copies)
        rows_ND = torch.randn(distinct, inputs).repeat_interleave(copies, dim=0)
        gate.weight.data = rows_ND
        x_TD = torch.randn(tokens, inputs)
        logits_TNC = gate(x_TD).view(tokens, distinct, copies)
        assert (logits_TNC == logits_TNC[..., :1]).all()
        assert relative_error(logits_TNC.flatten(1), x_TD.double() @ rows_ND.double().T) < 1e-5
