"""Balance losses: published values, plain loops, finite differences, and what must not matter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.config.balance import (
    AdaptiveLoss,
    BalanceLoss,
    CommunicationLoss,
    DeviceLoss,
    ImportanceLoss,
    LoadLoss,
    SequenceLoss,
    SwitchLoss,
    ZLoss,
)
from consilium.config.balance import Balance as BalanceConfig
from consilium.config.router import (
    LearnedNoise,
    Router,
    SoftmaxOfSelected,
    TopK,
)
from consilium.moe import losses
from consilium.moe.balance import Balance
from consilium.moe.routing.chance import chance
from consilium.moe.routing.gate import Level
from consilium.moe.types import LayerMode, Routing, Tokens
from moe.cases import SYSTEMS, V3, decision, layer, moe, some_tokens, tokens, vectors
from support import relative_error

TRAINING = LayerMode(training=True)
PLAIN = Router(select=TopK(k=4))


def value(loss: BalanceLoss, routing: Routing, every: Tokens, router: Router = PLAIN) -> Tensor:
    balance = Balance(BalanceConfig(losses=(loss,)), router, routing.logits_TE.shape[1])
    report = balance(routing, every, TRAINING)
    assert set(report.losses) == {loss.kind}
    return report.losses[loss.kind]


def uniform(experts: int = 16, k: int = 4, rounds: int = 3) -> tuple[Routing, Tokens]:
    """Every expert chosen equally often, with equal probability, in each sequence; the last is padding."""
    size = experts // k
    count = rounds * size
    experts_TK = torch.arange(k)[None] * size + torch.arange(count)[:, None] % size
    keep_TK = torch.ones(count, k, dtype=torch.bool)
    every = tokens(count, sequences=rounds)
    keep_TK[-size:] = False
    scores_TE = torch.full((count, experts), 1 / experts)
    routing = decision(scores_TE, experts_TK, keep_TK, keep_TK / k, torch.zeros(count, experts))
    return routing, replace(every, valid_T=every.sequence_T < rounds - 1)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (SwitchLoss(coefficient=0.25), 0.25),
        (SwitchLoss(coefficient=0.25, counts="first"), 0.25),
        (SequenceLoss(coefficient=0.25), 0.25),
        (SequenceLoss(coefficient=0.25, counts="scores"), 0.25),
        (DeviceLoss(coefficient=0.25, devices=4), 0.25),
        (DeviceLoss(coefficient=0.25, devices=4, scope="sequence"), 0.25),
        (CommunicationLoss(coefficient=0.25, devices=4, most=4), 0.25),
        (CommunicationLoss(coefficient=0.25, devices=2, most=2, scope="batch"), 0.25),
        (ImportanceLoss(coefficient=0.25), 0.0),
        (AdaptiveLoss(start=0.25), 0.0),
        (ZLoss(coefficient=0.25), 0.25 * math.log(16) ** 2),
    ],
    ids=repr,
)
def test_published_values_at_perfect_balance(loss: BalanceLoss, expected: float) -> None:
    routing, every = uniform()
    assert value(loss, routing, every).item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_gshards_own_value_is_one_over_the_square_of_experts() -> None:
    """Its auxiliary loss is the first-choice Switch loss over E squared: 1/256 at 16 experts."""
    experts_TK = torch.arange(16)[:, None]
    scores_TE = torch.full((16, 16), 1 / 16)
    keep_TK = torch.ones(16, 1, dtype=torch.bool)
    routing = decision(scores_TE, experts_TK, keep_TK, keep_TK.float())
    assert (
        value(SwitchLoss(coefficient=1.0, counts="first"), routing, tokens(16)).item() / 16**2 == 0.00390625
    )


LOSSES: tuple[BalanceLoss, ...] = (
    SwitchLoss(coefficient=1.0),
    SwitchLoss(coefficient=1.0, counts="first"),
    SequenceLoss(coefficient=1.0),
    SequenceLoss(coefficient=1.0, counts="scores"),
    DeviceLoss(coefficient=1.0, devices=4),
    DeviceLoss(coefficient=1.0, devices=2, scope="sequence"),
    CommunicationLoss(coefficient=1.0, devices=4, most=2),
    CommunicationLoss(coefficient=1.0, devices=4, most=3, scope="batch"),
    ImportanceLoss(coefficient=1.0),
    ZLoss(coefficient=1.0),
    AdaptiveLoss(start=1.0),
)


def by_hand(loss: BalanceLoss, routing: Routing, every: Tokens) -> Tensor:
    """The same loss with loops over sequences, tokens and experts, in float64."""
    experts = routing.logits_TE.shape[1]
    valid = [t for t in range(every.count) if every.valid_T[t]]
    scores, clean = routing.scores_TE.double(), routing.clean_TE.double()
    if isinstance(loss, ZLoss):
        return sum(torch.log(sum(torch.exp(z) for z in clean[t])) ** 2 for t in valid) / len(valid)
    if isinstance(loss, ImportanceLoss):
        total = [torch.zeros((), dtype=torch.float64) for _ in range(experts)]
        for t in valid:
            for r, e in enumerate(routing.experts_TK[t].tolist()):
                if routing.keep_TK[t, r]:
                    total[e] = total[e] + routing.weights_TK[t, r].double()
        mean = sum(total) / experts
        return sum((x - mean) ** 2 for x in total) / experts / mean**2
    scope = "sequence" if isinstance(loss, SequenceLoss) else getattr(loss, "scope", "batch")
    parts = [valid]
    if scope == "sequence":
        parts = [
            [t for t in valid if every.sequence_T[t] == s] for s in sorted(set(every.sequence_T.tolist()))
        ]
    values = [_segment(loss, routing, scores, part) for part in parts if part]
    return sum(values) / len(values)


def _segment(loss: BalanceLoss, routing: Routing, scores: Tensor, part: list[int]) -> Tensor:
    experts = scores.shape[1]
    p = [sum(scores[t, e] / scores[t].sum() for t in part) / len(part) for e in range(experts)]
    if isinstance(loss, AdaptiveLoss):
        return sum((1 / experts - x) ** 2 for x in p)
    chosen = []
    for t in part:
        row = [
            e
            for e, kept in zip(routing.experts_TK[t].tolist(), routing.keep_TK[t].tolist(), strict=True)
            if kept
        ]
        if getattr(loss, "counts", "") == "first":
            row = row[:1]
        if getattr(loss, "counts", "") == "scores":
            row = scores[t].argsort(descending=True)[: routing.experts_TK.shape[1]].tolist()
        chosen.append(row)
    copies = sum(len(row) for row in chosen)
    f = [experts * sum(e in row for row in chosen) / copies for e in range(experts)]
    if isinstance(loss, SwitchLoss | SequenceLoss):
        return sum(a * b for a, b in zip(f, p, strict=True))
    assert isinstance(loss, DeviceLoss | CommunicationLoss)
    size = experts // loss.devices
    total = torch.zeros((), dtype=torch.float64)
    for d in range(loss.devices):
        here = range(d * size, (d + 1) * size)
        if isinstance(loss, DeviceLoss):
            share = sum(f[e] for e in here) / size
        else:
            sent = sum(any(e in here for e in row) for row in chosen)
            share = loss.devices / (loss.most * len(part)) * sent
        total = total + share * sum(p[e] for e in here)
    return total


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("name", ["deepseek-v3", "mixtral", "gshard", "relu", "deepseek-v2", "shazeer"])
def test_losses_equal_plain_loops_in_values_and_gradients(loss: BalanceLoss, name: str) -> None:
    built = layer(moe(SYSTEMS[name].router))
    x_TD, every = vectors(29), tokens(29, sequences=4, padding=9)
    mode = LayerMode(training=True, generator=torch.Generator().manual_seed(0))
    routing = built.router(x_TD, built.balance.bias_E, every, mode)
    actual, expected = value(loss, routing, every), by_hand(loss, routing, every)
    assert relative_error(actual, expected) < 1e-5
    weight = built.router.projection.weight
    (gradient,) = torch.autograd.grad(actual, weight, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, weight)
    assert relative_error(gradient, wanted) < 1e-4


def test_the_sequence_loss_of_v3_counts_scores_without_bias() -> None:
    built = layer(moe(V3))
    x_TD, every = vectors(40), tokens(40)
    results = []
    for bias in (torch.zeros(8), torch.linspace(-2, 2, 8)):
        routing = built.router(x_TD, bias, every, LayerMode())
        results.append([value(SequenceLoss(counts=c), routing, every).item() for c in ("scores", "routed")])
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert results[0][1] != pytest.approx(results[1][1], rel=1e-2)


def test_the_load_loss_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    deviation = torch.rand(11, 6, generator=generator, dtype=torch.float64) + 0.1
    noisy = clean + deviation * torch.randn(11, 6, generator=generator, dtype=torch.float64)
    valid = torch.arange(11) < 9
    load = torch.zeros(6, dtype=torch.float64)
    for t in range(9):
        for e in range(6):
            others = sorted((noisy[t, j].item() for j in range(6) if j != e), reverse=True)
            z = (clean[t, e] - others[2 - 1]) / deviation[t, e]
            load[e] += 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    expected = load.var(correction=0) / load.mean() ** 2
    assert (
        relative_error(losses.load_loss(chance(Level(clean, noisy, deviation), 2), valid), expected) < 1e-12
    )
    assert losses.load_loss(chance(Level(clean, noisy, deviation), 6), valid) == 0


@pytest.mark.parametrize("k", [1, 3])
def test_the_load_loss_has_true_gradients(k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    clean, noise = (
        torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    normal = torch.randn(7, 5, generator=generator, dtype=torch.float64)

    def of(clean: Tensor, noise: Tensor) -> Tensor:
        deviation = torch.nn.functional.softplus(noise)
        level = Level(clean, clean + normal * deviation, deviation)
        return losses.load_loss(chance(level, k), torch.arange(7) < 6)

    assert torch.autograd.gradcheck(of, (clean, noise))


def test_smooth_losses_have_true_gradients() -> None:
    scores = torch.rand(9, 6, dtype=torch.float64, requires_grad=True)
    every = tokens(9, padding=2)
    part = losses.by_sequence(every, every.sequence_T)
    f_SE = torch.rand(part.count, 6, dtype=torch.float64)

    def of(scores: Tensor) -> tuple[Tensor, ...]:
        p_SE = part.means(losses.normalised(scores))
        return (
            losses.expert_loss(f_SE, p_SE, part),
            losses.device_loss(f_SE, p_SE, 3, part),
            losses.communication_loss(f_SE[:, :3], p_SE, 2, part),
            losses.uniformity_loss(p_SE, part),
            losses.squared_variation(scores.sum(dim=0)),
            losses.z_loss(scores, losses.whole_batch(every)),
        )

    assert torch.autograd.gradcheck(of, (scores,))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_padding_changes_no_loss_and_no_gradient(loss: BalanceLoss) -> None:
    built = layer(moe(V3))
    every = tokens(26, sequences=3, padding=6)
    x_TD = vectors(26)
    x_TD[20:] = 50.0
    outcomes = []
    for count in (20, 26):
        part = some_tokens(every, torch.arange(count))
        actual = value(loss, built.router(x_TD[:count], built.balance.bias_E, part, LayerMode()), part)
        outcomes.append((actual, *torch.autograd.grad(actual, built.router.projection.weight)))
    for plain, padded in zip(*outcomes, strict=True):
        assert relative_error(padded, plain) < 1e-5


@given(seed=st.integers(0, 10**6))
def test_sequence_losses_do_not_depend_on_how_sequences_are_grouped(seed: int) -> None:
    built = layer(moe(V3))
    every, x_TD = tokens(40, sequences=4, seed=seed), vectors(40, seed)

    def of(rows: slice) -> Tensor:
        part = some_tokens(every, torch.arange(40)[rows])
        part = replace(part, sequence_T=part.sequence_T - part.sequence_T.min())
        routing = built.router(x_TD[rows], built.balance.bias_E, part, LayerMode())
        return value(SequenceLoss(coefficient=1.0), routing, part)

    halves = (of(slice(0, 20)) + of(slice(20, 40))) / 2
    assert relative_error(halves, of(slice(0, 40))) < 1e-5


def test_empty_sequences_count_for_nothing() -> None:
    built, every, x_TD = layer(moe(V3)), tokens(20, sequences=2), vectors(20)
    routing = built.router(x_TD, built.balance.bias_E, every, LayerMode())
    gap = replace(every, sequence_T=every.sequence_T * 3 + 1, sequences=5)
    for loss in (SequenceLoss(coefficient=1.0), CommunicationLoss(coefficient=1.0, devices=4, most=2)):
        assert value(loss, routing, gap).item() == pytest.approx(value(loss, routing, every).item(), rel=1e-6)


def test_pushing_all_sigmoids_down_does_not_lower_the_loss() -> None:
    """With an epsilon in the divisor of P the loss falls to zero as the scores do."""
    experts_TK = torch.zeros(4, 2, dtype=torch.int64) + torch.tensor([0, 1])
    keep_TK = torch.ones(4, 2, dtype=torch.bool)
    outcomes = []
    for shift in (0.0, -40.0, -60.0, -1000.0):
        logits_TE = torch.tensor([[2.0, 1, 0, -1]]).expand(4, 4) + shift
        scores_TE = torch.sigmoid(logits_TE)
        routing = decision(scores_TE, experts_TK, keep_TK, keep_TK.float(), logits_TE)
        outcomes.append(value(SwitchLoss(coefficient=1.0), routing, tokens(4)).item())
    assert outcomes[1] == pytest.approx(outcomes[2], rel=1e-5)
    assert min(outcomes) >= 1


def test_losses_are_of_training_and_named_by_kind() -> None:
    built = layer(
        moe(PLAIN, balance=BalanceConfig(losses=(SwitchLoss(), SwitchLoss(counts="first"), ZLoss())))
    )
    every, x_TD = tokens(9), vectors(9)
    assert built(x_TD, every, LayerMode()).report.losses == {}
    report = built(x_TD, every, TRAINING).report
    routing = built.router(x_TD, None, every, LayerMode())
    both = value(SwitchLoss(), routing, every) + value(SwitchLoss(counts="first"), routing, every)
    assert set(report.losses) == {"switch", "z"}
    assert relative_error(report.losses["switch"], both) < 1e-6


def test_a_zero_coefficient_is_a_zero_loss_with_zero_gradient() -> None:
    built = layer(moe(PLAIN))
    routing = built.router(vectors(9), None, tokens(9), LayerMode())
    loss = value(SwitchLoss(coefficient=0.0), routing, tokens(9))
    (gradient,) = torch.autograd.grad(loss, built.router.projection.weight)
    assert loss == 0
    assert not gradient.any()


def test_entropy_is_that_of_normalised_scores() -> None:
    routing = layer(moe(V3)).router(vectors(9), torch.zeros(8), tokens(9), LayerMode())
    p = routing.scores_TE.double() / routing.scores_TE.double().sum(dim=1, keepdim=True)
    expected = -(p * p.log()).sum(dim=1)[:7].mean()
    assert relative_error(losses.entropy(routing.scores_TE, torch.arange(9) < 7), expected) < 1e-6
    assert losses.entropy(torch.eye(4), torch.ones(4, dtype=torch.bool)) == 0
    assert losses.entropy(torch.zeros(3, 8), torch.ones(3, dtype=torch.bool)).item() == pytest.approx(
        math.log(8)
    )


def test_the_noise_of_shazeer_balances_loads_at_the_start() -> None:
    """Gate and noise start at zero, so every expert has the same chance."""
    router = Router(noise=LearnedNoise(), select=TopK(k=2), weight=SoftmaxOfSelected())
    config = moe(
        router, balance=BalanceConfig(losses=(LoadLoss(coefficient=1.0), ImportanceLoss(coefficient=1.0)))
    )
    built = layer(config)
    for parameter in built.router.parameters():
        torch.nn.init.zeros_(parameter)
    mode = LayerMode(training=True, generator=torch.Generator().manual_seed(0))
    report = built(vectors(4000), tokens(4000), mode).report
    assert report.losses["load"] < 1e-3
    assert report.losses["importance"] < 1e-2
    assert float(report.load_E.max() / report.load_E.min()) < 1.2
