"""The state that moves between steps: the selection bias and the adaptive coefficient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from consilium.config.balance import (
    SMEBU,
    AdaptiveLoss,
    BiasRule,
    LinearBias,
    NoBias,
    PIDBias,
    QuantileBias,
    SignBias,
)
from consilium.config.balance import Balance as BalanceConfig
from consilium.config.moe import Capacity
from consilium.config.router import Router, Sigmoid, TopK
from consilium.moe.balance import Balance
from consilium.moe.types import LayerMode, Taken
from moe.cases import EXPERTS, SYSTEMS, V3, layer, moe, tokens, vectors
from support import relative_error

BIASED = Router(score=Sigmoid(), offset="scores", select=TopK(k=2))


def balance(rule: BiasRule, router: Router = BIASED, experts: int = 4) -> Balance:
    return Balance(BalanceConfig(bias=rule), router, experts)


def test_the_sign_rule_moves_each_expert_by_the_rate_towards_the_mean() -> None:
    built = balance(SignBias(rate=0.001))
    built.step(Taken(torch.tensor([8, 4, 4, 0])))
    built.step(Taken(torch.tensor([8, 4, 3, 1])))
    assert built.bias_E is not None
    assert torch.equal(built.bias_E, torch.tensor([-0.002, 0, 0.001, 0.002]))


def test_the_linear_rule_moves_in_proportion_to_the_relative_excess() -> None:
    built = balance(LinearBias(rate=0.01))
    built.step(Taken(torch.tensor([8, 4, 3, 1])))
    assert built.bias_E is not None
    torch.testing.assert_close(built.bias_E, 0.01 * torch.tensor([-1, 0, 0.25, 0.75]))


@given(st.lists(st.integers(0, 2**40), min_size=3, max_size=3))
def test_the_sign_is_exact_for_any_counts(counts: list[int]) -> None:
    built = balance(SignBias(rate=1.0), experts=3)
    built.step(Taken(torch.tensor(counts)))
    assert built.bias_E is not None
    mean_times_three = sum(counts)
    expected = [(mean_times_three > 3 * c) - (mean_times_three < 3 * c) for c in counts]
    assert built.bias_E.tolist() == expected


@pytest.mark.parametrize(
    "rule", [SignBias(), LinearBias(), SMEBU(), PIDBias(), QuantileBias()], ids=lambda rule: rule.kind
)
def test_a_step_without_tokens_moves_nothing(rule: BiasRule) -> None:
    """Neither does momentum, nor a change of the error."""
    built = Balance(BalanceConfig(losses=(AdaptiveLoss(),), bias=rule), BIASED, 4)
    if not isinstance(rule, QuantileBias):
        built.step(Taken(torch.tensor([3, 1, 0, 0])))
    before = {name: value.clone() for name, value in built.named_buffers()}
    built.step(Taken(torch.zeros(4, dtype=torch.int64)))
    assert all(torch.equal(value, before[name]) for name, value in built.named_buffers())


def test_the_coefficient_follows_the_drop_rate_with_momentum_and_saturates() -> None:
    config = BalanceConfig(losses=(AdaptiveLoss(start=0.004, most=0.01, slope=0.2, momentum=0.9),))
    built, wanted_E = Balance(config, Router(select=TopK(k=2)), 4), torch.ones(4, dtype=torch.int64)
    expected = 0.004
    for dropped, target in ((0.0, 0.0), (0.02, 0.004), (0.05, 0.01), (0.5, 0.01)):
        built.step(Taken(wanted_E, dropped))
        expected = 0.9 * expected + 0.1 * target
        assert built.coefficient is not None
        assert built.coefficient.item() == pytest.approx(expected, rel=1e-6)


def test_the_adaptive_loss_uses_the_coefficient_of_the_moment() -> None:
    config = moe(
        Router(select=TopK(k=2)),
        admission=Capacity(factor=1.0),
        balance=BalanceConfig(losses=(AdaptiveLoss(start=0.01, momentum=0.5),)),
    )
    built, mode = layer(config), LayerMode(training=True)
    first = built(vectors(9), tokens(9), mode).report.losses["adaptive"]
    built.balance.step(Taken(torch.ones(EXPERTS, dtype=torch.int64)))
    second = built(vectors(9), tokens(9), mode).report.losses["adaptive"]
    assert second.item() == pytest.approx(first.item() / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("rule", "offset", "expected"),
    [
        (NoBias(), "none", set()),
        (NoBias(), "scores", {"bias_E"}),
        (SignBias(), "scores", {"bias_E"}),
        (LinearBias(), "logits", {"bias_E"}),
    ],
)
def test_a_bias_is_stored_exactly_where_the_router_selects_with_one(
    rule: BiasRule, offset: str, expected: set[str]
) -> None:
    router = Router(score=Sigmoid(), offset=offset, select=TopK(k=2))
    assert set(balance(rule, router).state_dict()) == expected


def test_no_rule_leaves_a_loaded_bias_alone() -> None:
    built = balance(NoBias())
    built.load_state_dict({"bias_E": torch.tensor([1.0, 2, 3, 4])})
    built.step(Taken(torch.tensor([9, 0, 0, 0])))
    assert built.bias_E is not None
    assert built.bias_E.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_control_state_keeps_its_exact_values_when_the_model_is_cast(cast: torch.dtype) -> None:
    """In bfloat16 2.02 + 0.001 is 2.0156: the bias would be rounded and then never move again."""
    balance = BalanceConfig(losses=(AdaptiveLoss(start=0.00123),), bias=SignBias())
    config = moe(V3, admission=Capacity(factor=1.0), balance=balance)
    model = nn.Sequential(layer(config))
    state = model[0].balance
    state.bias_E.copy_(torch.linspace(-2.02, 2.02, EXPERTS))
    before = {name: value.clone() for name, value in state.state_dict().items()}
    model.to(cast)
    assert model[0].experts.up.dtype == cast
    for name, value in state.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    assert set(model.state_dict()) == {f"0.{name}" for name in layer(config).state_dict()}
    state.step(Taken(torch.tensor([1, 0, 0, 0, 0, 0, 0, 7])))
    assert (state.bias_E != before["bias_E"]).sum() == EXPERTS - 1


def test_a_cast_model_still_routes_in_float32_with_its_float32_bias() -> None:
    built, x_TD = layer(SYSTEMS["deepseek-v3"]), vectors(40)
    built.balance.bias_E += torch.linspace(0, 1e-4, EXPERTS)
    bias_E = built.balance.bias_E.clone()
    built.bfloat16()
    result = built(x_TD.bfloat16(), tokens(40), LayerMode())
    weight = built.router.projection.weight
    assert weight.dtype == result.y_TD.dtype == torch.bfloat16
    scores_TE = result.routing.scores_TE
    expected_TE = torch.sigmoid(x_TD.bfloat16().double() @ weight.double().T)
    assert relative_error(scores_TE, expected_TE) < 1e-6
    group_TG = (scores_TE + bias_E).view(40, 4, 2).sum(dim=2)
    open_TG = torch.zeros(40, 4, dtype=torch.bool).scatter(1, group_TG.topk(2, dim=1).indices, value=True)
    values_TE = (scores_TE + bias_E).masked_fill(~open_TG.repeat_interleave(2, dim=1), -torch.inf)
    assert torch.equal(result.routing.experts_TK, values_TE.topk(3, dim=1).indices)
    assert result.routing.weights_TK.dtype == torch.float32


def test_a_meta_model_made_real_has_real_float32_control_state() -> None:
    with torch.device("meta"):
        built = layer_on_meta()
    built.to_empty(device="cpu")
    assert built.bias_E is not None
    assert built.bias_E.device.type == "cpu"
    assert built.bias_E.dtype == torch.float32


def layer_on_meta() -> Balance:
    return Balance(BalanceConfig(losses=(AdaptiveLoss(),), bias=SignBias()), BIASED, EXPERTS)


@pytest.mark.parametrize("rule", [SignBias(rate=0.02), LinearBias(rate=0.02)], ids=lambda rule: rule.kind)
def test_with_a_capacity_an_expert_below_the_mean_moves_up(rule: SignBias | LinearBias) -> None:
    """Drops cut what is wanted to one load: by loads alone an expert below the mean can lie above it."""
    router = Router(score=Sigmoid(), offset="scores", select=TopK(k=2))
    config = moe(router, admission=Capacity(factor=0.5), balance=BalanceConfig(bias=rule))
    built = layer(config)
    built.balance.bias_E.zero_()
    x_TD = vectors(512) + 2 * built.router.projection.weight[0].detach()
    report = built(x_TD, tokens(512), LayerMode(training=True)).report
    wanted_E, load_E = report.wanted_E, report.load_E
    misled_E = (wanted_E < wanted_E.float().mean()) & (load_E > load_E.float().mean())
    assert misled_E.any()
    built.balance.step(Taken(wanted_E))
    assert (built.balance.bias_E[wanted_E < wanted_E.float().mean()] > 0).all()
    assert (built.balance.bias_E[wanted_E > wanted_E.float().mean()] < 0).all()


def test_the_bias_brings_a_collapsed_router_back_into_balance() -> None:
    """Scores favour one expert by far; only the bias moves, as in training with the sign rule."""
    router = Router(score=Sigmoid(), offset="scores", select=TopK(k=2))
    built = layer(moe(router, balance=BalanceConfig(bias=SignBias(rate=0.02))))
    built.balance.bias_E.zero_()
    x_TD = vectors(512) + 2 * built.router.projection.weight[0].detach()
    loads = []
    for _ in range(150):
        report = built(x_TD, tokens(512), LayerMode(training=True)).report
        built.balance.step(Taken(report.wanted_E))
        loads.append(float(report.load_E.max() / report.load_E.float().mean()))
    assert loads[0] > 3
    assert loads[-1] < 1.2


def shortfall(counts: list[int]) -> list[float]:
    mean = sum(counts) / len(counts)
    return [(mean - count) / mean for count in counts]


LOADS = ([8, 4, 4, 0], [1, 7, 3, 5], [4, 4, 4, 4], [0, 0, 0, 16], [5, 3, 4, 4])


def test_a_centred_sign_rule_has_biases_that_sum_to_zero_and_choose_alike() -> None:
    plain, centred = balance(SignBias(rate=0.125)), balance(SignBias(rate=0.125, centred=True))
    for counts in LOADS:
        for built in (plain, centred):
            built.step(Taken(torch.tensor(counts)))
    assert plain.bias_E is not None
    assert centred.bias_E is not None
    assert plain.bias_E.sum() != 0
    torch.testing.assert_close(centred.bias_E, plain.bias_E - plain.bias_E.mean())


def test_smebu_is_its_equations_in_plain_loops() -> None:
    built = balance(SMEBU(rate=0.01, steepness=3.0, momentum=0.7))
    bias, momentum = [0.0] * 4, [0.0] * 4
    for counts in LOADS:
        built.step(Taken(torch.tensor(counts)))
        clamped = [math.tanh(3.0 * v) for v in shortfall(counts)]
        centred = [v - sum(clamped) / 4 for v in clamped]
        momentum = [0.7 * m + 0.3 * 0.01 * v for m, v in zip(momentum, centred, strict=True)]
        bias = [b + m for b, m in zip(bias, momentum, strict=True)]
        assert built.bias_E is not None
        assert built.bias_E.tolist() == pytest.approx(bias, rel=1e-5, abs=1e-8)


def test_pid_is_the_sum_of_its_three_terms() -> None:
    built = balance(PIDBias(proportional=0.5, integral=0.25, derivative=0.125))
    start = torch.tensor([0.5, -0.5, 0.25, 0.0])
    assert built.bias_E is not None
    built.bias_E.copy_(start)
    errors: list[list[float]] = [[0.0] * 4]
    for counts in LOADS:
        built.step(Taken(torch.tensor(counts)))
        errors.append([1 / 4 - count / sum(counts) for count in counts])
        for e in range(4):
            now, past = errors[-1][e], errors[-2][e]
            whole = 0.5 * now + 0.25 * sum(error[e] for error in errors) + 0.125 * (now - past)
            assert built.bias_E[e].item() == pytest.approx(start[e].item() + whole, rel=1e-5, abs=1e-7)


def test_the_integral_alone_is_the_rule_that_longcat_prints() -> None:
    """Where every expert is a real one, K_e = K: b += mu (K_e / K * 1 / N - T_i / (K T))."""
    pid, bias, k = balance(PIDBias(proportional=0, integral=0.3, derivative=0)), [0.0] * 4, 2
    for counts in LOADS:
        pid.step(Taken(torch.tensor(counts)))
        tokens_T = sum(counts) / k
        bias = [b + 0.3 * (1 / 4 - count / (k * tokens_T)) for b, count in zip(bias, counts, strict=True)]
    assert pid.bias_E is not None
    assert pid.bias_E.tolist() == pytest.approx(bias, rel=1e-5, abs=1e-8)


MOVING: tuple[BiasRule, ...] = (
    SignBias(rate=0.02),
    SignBias(rate=0.02, centred=True),
    LinearBias(rate=0.02),
    SMEBU(rate=0.02),
    PIDBias(),
)


@pytest.mark.parametrize("rule", MOVING, ids=repr)
def test_a_bias_stays_from_its_share_of_the_run_on(rule: BiasRule) -> None:
    """Steps 0, 1 and 2 of 10 move it and no later one, however often it is asked: DeepSeek-V3's schedule."""
    built = Balance(BalanceConfig(bias=rule, bias_until=0.3), BIASED, 4)
    moved = []
    for step in range(10):
        assert built.bias_E is not None
        before = built.bias_E.clone()
        built.step(Taken(torch.tensor([5, 1, 1, 1]), progress=step / 10))
        moved.append(not torch.equal(built.bias_E, before))
    assert moved == [True] * 3 + [False] * 7


@pytest.mark.parametrize("rule", MOVING, ids=repr)
@pytest.mark.parametrize("counts", [[5, 1, 1, 1], [0, 0, 3, 0]])
def test_every_rule_moves_an_idle_expert_up_and_a_crowded_one_down(rule: BiasRule, counts: list[int]) -> None:
    built = balance(rule)
    for _ in range(5):
        built.step(Taken(torch.tensor(counts)))
    assert built.bias_E is not None
    crowded = max(range(4), key=counts.__getitem__)
    assert all((built.bias_E[e] < 0) == (e == crowded) for e in range(4))


@pytest.mark.parametrize("rule", [SMEBU(), PIDBias()], ids=lambda rule: rule.kind)
def test_what_a_rule_keeps_is_float32_follows_a_cast_and_is_not_with_the_weights(rule: BiasRule) -> None:
    built = balance(rule)
    built.step(Taken(torch.tensor([5, 1, 1, 1])))
    before = {name: value.clone() for name, value in built.controls.items()}
    assert set(built.state_dict()) == {"bias_E"}
    nn.Sequential(built).to(torch.bfloat16)
    assert set(built.state_dict()) == {"bias_E"}
    assert before
    for name, value in built.controls.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
        assert value.any()
