"""Balance losses: their values at perfect uniformity, what they average over, and their gradients.

Legend: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

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
from consilium.config.router import LearnedNoise, Router, SampledSecond, Sigmoid, SoftmaxOfSelected, TopK
from consilium.moe.balance import Balance
from consilium.moe.routing.chance import chance
from consilium.moe.routing.gate import Level
from consilium.moe.routing.router import Router as RouterModule
from consilium.moe.types import Counted, LayerMode, Tokens
from moe.cases import decision

EXPERTS, K = 16, 4
TRAINING = LayerMode(training=True)
NOISY = Router(noise=LearnedNoise(), select=TopK(k=K), weight=SoftmaxOfSelected())
PLAIN = Router(select=TopK(k=K))


def tokens(count: int, sequences: int = 1) -> Tokens:
    place_T = torch.arange(count)
    return Tokens(place_T, place_T * sequences // count, place_T, torch.ones(count, dtype=torch.bool))


def in_turn(rounds: int = 2) -> Tensor:
    """Logits [T, E] of which each token's are the last one's, one expert on: all experts fare alike."""
    falling_E = torch.linspace(2, -2, EXPERTS)
    return torch.stack([falling_E.roll(t) for t in range(rounds * EXPERTS)])


def value(
    loss: BalanceLoss, x_TE: Tensor, every: Tokens, router: Router = PLAIN, earlier_E: Tensor | None = None
) -> float:
    """One loss of a layer whose gate is the identity, end to end."""
    module = RouterModule(router, EXPERTS, EXPERTS)
    with torch.no_grad():
        module.projection.weight.copy_(torch.eye(EXPERTS))
    routing = module(x_TE, torch.zeros(EXPERTS), every, LayerMode())
    earlier = None if earlier_E is None else Counted(earlier_E, torch.tensor(0))
    mode = replace(TRAINING, earlier=earlier)
    report = Balance(BalanceConfig(losses=(loss,)), router, EXPERTS)(routing, every, mode)
    return report.losses[loss.kind].item()


@pytest.mark.parametrize(
    ("loss", "router", "expected"),
    [
        (SwitchLoss(coefficient=1.0), PLAIN, 1.0),
        (SwitchLoss(coefficient=1.0), Router(score=Sigmoid(), select=TopK(k=K)), 1.0),
        (SwitchLoss(coefficient=1.0, scope="global"), PLAIN, 1.0),
        (SwitchLoss(coefficient=1.0, counts="first"), Router(select=SampledSecond()), 1.0),
        (SequenceLoss(coefficient=1e-4), Router(score=Sigmoid(), select=TopK(k=K)), 1e-4),
        (SequenceLoss(coefficient=1e-4, counts="scores"), PLAIN, 1e-4),
        (DeviceLoss(coefficient=0.05, devices=8), PLAIN, 0.05),
        (DeviceLoss(coefficient=0.05, devices=8, scope="sequence"), PLAIN, 0.05),
        # Four neighbouring experts lie on two devices of four, but for one token in four on one.
        (CommunicationLoss(coefficient=0.02, devices=4, most=2), PLAIN, 0.02 * (0.25 * 1 + 0.75 * 2) / 2),
        (ImportanceLoss(coefficient=0.1), PLAIN, 0.0),
        (LoadLoss(coefficient=0.1), NOISY, 0.0),
        (AdaptiveLoss(start=0.01), PLAIN, 0.0),
    ],
    ids=repr,
)
def test_published_values_at_perfect_uniformity(loss: BalanceLoss, router: Router, expected: float) -> None:
    """Routed by a real router, over two sequences that are each balanced."""
    found = value(loss, in_turn(), tokens(2 * EXPERTS, sequences=2), router)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_the_loss_of_transformers_is_k_where_the_published_one_is_one() -> None:
    pooled = float(load_balancing_loss_func((in_turn(),), EXPERTS, K))
    assert pooled == pytest.approx(K * value(SwitchLoss(coefficient=1.0), in_turn(), tokens(2 * EXPERTS)))
    assert pooled == pytest.approx(4.0)


def test_pooling_layers_hides_their_imbalance() -> None:
    """Two layers that use complementary halves of the experts look balanced to transformers, not to us."""
    low, high = halves().split(8)
    pooled = float(load_balancing_loss_func((low, high), EXPERTS, K)) / K
    apart = [value(SwitchLoss(coefficient=1.0), half, tokens(8)) for half in (low, high)]
    assert pooled == pytest.approx(1.0)
    assert apart == pytest.approx([2.0, 2.0])


def halves() -> Tensor:
    """Logits [16, E] of two sequences, each balanced over its own half of the experts; balanced together."""
    x_TE, falling_E = torch.full((16, EXPERTS), -30.0), torch.linspace(2, -2, 8)
    for t in range(8):
        x_TE[t, :8] = x_TE[8 + t, 8:] = falling_E.roll(t)
    return x_TE


def test_each_scope_averages_over_what_it_names() -> None:
    """Sequence: each one alone. Micro-batch: both. Global: the rest of the step as well."""
    x_TE, every, alone = halves(), tokens(16, sequences=2), tokens(8)
    batch, overall = SwitchLoss(coefficient=1.0), SwitchLoss(coefficient=1.0, scope="global")
    assert value(SequenceLoss(coefficient=1.0), x_TE, every) == pytest.approx(2.0)
    assert value(batch, x_TE, every) == pytest.approx(1.0)
    assert value(batch, x_TE[8:], alone) == pytest.approx(2.0)
    counted_E = loads(x_TE[:8], alone)
    assert value(overall, x_TE[8:], alone, earlier_E=counted_E) == pytest.approx(1.0)
    assert value(batch, x_TE[8:], alone, earlier_E=counted_E) == pytest.approx(2.0)


def loads(x_TE: Tensor, every: Tokens) -> Tensor:
    module = RouterModule(PLAIN, EXPERTS, EXPERTS)
    with torch.no_grad():
        module.projection.weight.copy_(torch.eye(EXPERTS))
    return module(x_TE, None, every, LayerMode()).load_E()


LOSSES: tuple[BalanceLoss, ...] = (
    SwitchLoss(coefficient=1.0),
    SwitchLoss(coefficient=1.0, counts="first"),
    SwitchLoss(coefficient=1.0, scope="global"),
    SequenceLoss(coefficient=1.0),
    SequenceLoss(coefficient=1.0, counts="scores"),
    DeviceLoss(coefficient=1.0, devices=2),
    DeviceLoss(coefficient=1.0, devices=2, scope="sequence"),
    CommunicationLoss(coefficient=1.0, devices=2, most=2),
    CommunicationLoss(coefficient=1.0, devices=2, most=1, scope="batch"),
    ImportanceLoss(coefficient=1.0),
    LoadLoss(coefficient=1.0),
    ZLoss(coefficient=1.0),
    AdaptiveLoss(start=1.0),
)


def in_float64(loss: BalanceLoss, score: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The loss as a function of logits [T, 6]; which experts are chosen is held, as counts have no slope."""
    generator = torch.Generator().manual_seed(3)
    every = replace(tokens(8, sequences=2), valid_T=torch.arange(8) != 3)
    chosen_TK = torch.rand(8, 6, generator=generator).topk(2).indices
    keep_TK = every.valid_T[:, None].expand(8, 2)
    draw_TE = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    module = Balance(BalanceConfig(losses=(loss,)), NOISY, 6).double()

    def of(logits_TE: Tensor) -> Tensor:
        scores_TE = score(logits_TE)
        weights_TK = scores_TE.gather(1, chosen_TK) * keep_TK
        deviation_TE = torch.nn.functional.softplus(logits_TE.flip(1))
        smooth_TE = chance(Level(logits_TE, logits_TE + draw_TE * deviation_TE, deviation_TE), 2)
        routing = decision(scores_TE, chosen_TK, keep_TK, weights_TK, logits_TE, chance_TE=smooth_TE)
        mode = replace(TRAINING, earlier=Counted(torch.arange(6), torch.tensor(0)))
        return module(routing, every, mode).losses[loss.kind]

    return of


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("score", [lambda z: z.softmax(1), torch.sigmoid], ids=["softmax", "sigmoid"])
def test_gradients_equal_central_differences(loss: BalanceLoss, score: Callable[[Tensor], Tensor]) -> None:
    of = in_float64(loss, score)
    z_TE = torch.randn(8, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    z_TE.requires_grad_()
    result = of(z_TE)
    (gradient_TE,) = torch.autograd.grad(result, z_TE)
    assert result.dtype == torch.float64
    numeric_TE, step = torch.zeros_like(z_TE), 1e-5
    for t in range(8):
        for e in range(6):
            nudge_TE = torch.zeros_like(z_TE)
            nudge_TE[t, e] = step
            rise = of(z_TE + nudge_TE) - of(z_TE - nudge_TE)
            numeric_TE[t, e] = rise.detach() / (2 * step)
    assert (gradient_TE - numeric_TE).norm() < 1e-7 * numeric_TE.norm()
    assert not gradient_TE[3].any(), "padding has no gradient"


def test_every_loss_of_the_union_is_covered() -> None:
    union: Any = get_args(BalanceLoss)[0]
    assert {type(loss) for loss in LOSSES} == set(get_args(union))


def test_the_z_loss_at_uniform_logits_is_the_squared_logarithm_of_experts() -> None:
    found = value(ZLoss(coefficient=1.0), torch.zeros(5, EXPERTS), tokens(5))
    assert found == pytest.approx(math.log(EXPERTS) ** 2, rel=1e-6)
