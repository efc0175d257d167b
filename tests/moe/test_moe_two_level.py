"""Hierarchical mixtures: what two gates decide, and the smooth load of both.

Legend: T tokens, G groups, E experts, K choices a token.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.config.balance import Balance, ImportanceLoss, LoadLoss, ZLoss
from consilium.config.moe import MoE
from consilium.config.router import LearnedNoise, Router, SoftmaxOfSelected, TwoLevel
from consilium.moe.layer import MoELayer
from consilium.moe.losses import squared_variation
from consilium.moe.routing.chance import joint_chance
from consilium.moe.routing.gate import Level
from consilium.moe.routing.router import Router as RouterModule
from consilium.moe.types import LayerMode, Override, Replay, Routing
from moe import naive_levels
from moe.cases import HIDDEN, layer, tokens, vectors
from support import relative_error

EXPERTS = 12
SHAPES = st.sampled_from([(3, 2, 2), (4, 3, 2), (2, 2, 5), (6, 4, 1), (3, 1, 4), (1, 1, 3), (12, 5, 1)])
LOSSES = Balance(losses=(LoadLoss(coefficient=1.0), ImportanceLoss(coefficient=1.0)))


def hierarchy(groups: int, keep: int, k: int, **options: object) -> MoE:
    select = TwoLevel(groups=groups, keep=keep, k=k)
    router = Router(noise=LearnedNoise(), select=select, weight=SoftmaxOfSelected())
    return MoE(experts=EXPERTS, width=6, router=router, **options)


def state(router: RouterModule) -> dict[str, Tensor]:
    return {f"router.{name}": value.detach().double() for name, value in router.named_parameters()}


@given(shape=SHAPES, seed=st.integers(0, 10**6))
def test_routing_is_that_of_two_gates(shape: tuple[int, int, int], seed: int) -> None:
    config = hierarchy(*shape)
    router, x_TD = layer(config, seed).router, vectors(9, seed)
    routing = router(x_TD, None, tokens(9, padding=2), LayerMode())
    assert isinstance(config.router.select, TwoLevel)
    for t in range(7):
        row = x_TD[t].double()
        expected = naive_levels.weights(config.router, state(router), row)
        assert routing.keep_TK[t].all()
        assert routing.experts_TK[t].tolist() == list(expected)
        assert relative_error(routing.weights_TK[t], torch.stack(list(expected.values()))) < 2e-5
        joint = naive_levels.joint_logits(config.router.select, state(router), row)
        assert relative_error(routing.logits_TE[t], joint) < 1e-5
        assert relative_error(routing.scores_TE[t], joint.exp()) < 1e-5
    assert not routing.keep_TK[7:].any()
    assert relative_error(routing.weights_TK.sum(dim=1), torch.tensor([1.0] * 7 + [0.0] * 2)) < 1e-6


def picked(
    primary: list[float], secondary: list[float], mode: LayerMode = LayerMode(), k: int = 2
) -> Routing:
    """Route one token whose gates say exactly this, two of the groups kept."""
    router = Router(select=TwoLevel(groups=len(primary), keep=2, k=k), weight=SoftmaxOfSelected())
    built = RouterModule(router, 1, len(secondary))
    with torch.no_grad():
        assert built.primary is not None
        built.primary.weight.copy_(torch.tensor(primary)[:, None])
        built.projection.weight.copy_(torch.tensor(secondary)[:, None])
    return built(torch.ones(1, 1), None, tokens(1), mode)


def test_groups_tie_to_the_lowest_whatever_their_experts_say() -> None:
    """The primary gate's own logits decide: sums of joint probabilities round differently in each group."""
    secondary = [0.3, -1.7, 2.9, 0.1, 5.3, -0.4, 1.1, 0.7, -3.1, 0.2, 0.9, 2.3]
    for shift in (0.0, 1.3, -2.7):
        routing = picked([shift, shift, shift, shift - 1], secondary)
        assert sorted(routing.experts_TK[0].tolist()) == [0, 2, 3, 4]


def test_experts_tie_to_the_lowest_in_their_group() -> None:
    routing = picked([1.0, 2.0, 0.0], [0.5, 0.5, 0.5, 0.5, 1.5, 1.5, 1.5, 1.5, 9, 9, 9, 9])
    assert routing.experts_TK[0].tolist() == [4, 5, 0, 1]
    e = torch.tensor([1.0, 2.0]).softmax(0) / 2
    assert relative_error(routing.weights_TK[0], e[[1, 1, 0, 0]]) < 1e-6


def mute(*experts: int, count: int = 6) -> LayerMode:
    mask_1E = torch.zeros(1, count, dtype=torch.bool)
    mask_1E[0, list(experts)] = True
    return LayerMode(override=Override(mute_TE=mask_1E))


def test_muting_experts_leaves_the_primary_gate_alone_until_a_group_is_empty() -> None:
    primary, secondary = [2.0, 1.0, 0.0], [0.0, 3, 0, 1, 0, 2]
    one = picked(primary, secondary, mute(1), k=1)
    assert one.experts_TK[one.keep_TK].tolist() == [3, 0] or one.experts_TK[one.keep_TK].tolist() == [0, 3]
    weights = dict(zip(one.experts_TK[0].tolist(), one.weights_TK[0].tolist(), strict=True))
    assert weights[0] == pytest.approx(torch.tensor([2.0, 1.0]).softmax(0)[0].item(), rel=1e-6)
    none = picked(primary, secondary, mute(0, 1), k=1)
    assert sorted(none.experts_TK[none.keep_TK].tolist()) == [3, 5]
    few = picked(primary, secondary, mute(1, 2), k=2)
    assert sorted(few.experts_TK[few.keep_TK].tolist()) == [0, 3]
    assert relative_error(few.weights_TK.sum(), torch.tensor(1.0)) < 1e-6
    assert not picked(primary, secondary, mute(*range(6)), k=2).keep_TK.any()


def test_a_budget_keeps_the_most_probable_and_weighs_them_anew() -> None:
    mode = LayerMode(override=Override(k_T=torch.tensor([3])))
    routing = picked([1.0, 0.0], [3.0, 2, -1, 1.5, 1, 0], mode)
    assert routing.experts_TK[routing.keep_TK].tolist() == [0, 1, 3]
    p, s = torch.tensor([1.0, 0.0]).softmax(0), torch.tensor([3.0, 2.0]).softmax(0)
    assert relative_error(routing.weights_TK[0, :3], torch.stack([p[0] * s[0], p[0] * s[1], p[1]])) < 1e-6


@given(shape=SHAPES, seed=st.integers(0, 10**6))
def test_replay_of_any_experts_weighs_them_as_two_softmaxes(shape: tuple[int, int, int], seed: int) -> None:
    groups, keep, k = shape
    router, x_TD = layer(hierarchy(*shape), seed).router, vectors(4, seed)
    experts_TK = vectors(4, seed + 1, hidden=EXPERTS).argsort(dim=1)[:, : keep * k]
    routing = router(x_TD, None, tokens(4), LayerMode(override=Override(replay=Replay.of(experts_TK))))
    size = EXPERTS // groups
    for t, order in enumerate(experts_TK.tolist()):
        primary, secondary = naive_levels.gates(router.config.select, state(router), x_TD[t].double())
        p = naive_levels.softmax({g: primary[g] for g in {e // size for e in order}})
        for e, weight in zip(order, routing.weights_TK[t], strict=True):
            mates = naive_levels.softmax(
                {j: secondary[j // size][j % size] for j in order if j // size == e // size}
            )
            assert relative_error(weight, p[e // size] * mates[e]) < 2e-5


@pytest.mark.parametrize("shape", [(3, 2, 2), (4, 3, 2), (2, 2, 5), (3, 1, 4)])
def test_the_joint_load_equals_its_definition_in_values_and_gradients(shape: tuple[int, int, int]) -> None:
    groups, keep, k = shape
    select = TwoLevel(groups=groups, keep=keep, k=k)
    valid_T = torch.arange(10) % 4 != 3
    primary, secondary = (drawn(10, n, seed) for seed, n in ((0, groups), (1, EXPERTS)))
    used_TG = torch.zeros(10, groups, dtype=torch.bool)
    used_TG.scatter_(1, primary[1].topk(keep, dim=1).indices, value=True)
    used_TG &= valid_T[:, None]
    chance_TE = joint_chance(Level(*primary), Level(*secondary), keep, k, used_TG, valid_T)
    assert not chance_TE[~valid_T].any()
    loads = naive_levels.load(select, list(primary), list(secondary), valid_T.tolist())
    expected_E = torch.stack([value for group in loads for value in group])
    assert relative_error(chance_TE.sum(dim=0), expected_E) < 1e-12
    found = torch.autograd.grad(
        squared_variation(chance_TE.sum(dim=0)), (*primary, *secondary), allow_unused=True
    )
    wanted = torch.autograd.grad(squared_variation(expected_E), (*primary, *secondary), allow_unused=True)
    for got, gradient in zip(found, wanted, strict=True):
        assert (got is None) == (gradient is None)
        assert got is None or relative_error(got, gradient) < 1e-9


def test_where_everything_is_kept_every_load_is_the_number_of_tokens() -> None:
    levels = Level(*drawn(10, 3, 0)), Level(*drawn(10, EXPERTS, 1))
    everyone_TG = torch.ones(10, 3, dtype=torch.bool)
    chance_TE = joint_chance(*levels, 3, 4, everyone_TG, everyone_TG[:, 0])
    assert chance_TE.sum(dim=0).tolist() == [10.0] * EXPERTS


def drawn(count: int, outputs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clean logits, noisy logits and deviations in float64."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise, normal = torch.randn(3, count, outputs, generator=generator, dtype=torch.float64)
    deviation = torch.nn.functional.softplus(noise)
    parts = (clean, clean + normal * deviation, deviation)
    return tuple(part.requires_grad_() for part in parts)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("shape", [(1, 1, 3), (4, 2, 2)])
def test_the_smooth_load_is_the_expected_load(shape: tuple[int, int, int]) -> None:
    """Over many draws of noise the chances add up to what the experts really get."""
    router = layer(hierarchy(*shape)).router
    mode = LayerMode(training=True, generator=torch.Generator().manual_seed(0))
    x_TD = vectors(40).repeat(200, 1)
    routing = router(0.5 * x_TD, None, tokens(8000), mode)
    assert routing.chance_TE is not None
    assert relative_error(routing.chance_TE.sum(dim=0), routing.load_E()) < 0.03


def test_gates_at_zero_share_tokens_and_losses_tell_uneven_ones() -> None:
    built = MoELayer(hierarchy(4, 2, 2, balance=LOSSES), HIDDEN, 0)
    for parameter in built.experts.parameters():
        torch.nn.init.normal_(parameter)
    mode = LayerMode(training=True, generator=torch.Generator().manual_seed(0))
    report = built(vectors(4000), tokens(4000), mode).report
    assert report.losses["load"] < 1e-3
    assert report.losses["importance"] < 1e-2
    uneven = layer(hierarchy(4, 2, 2, balance=LOSSES))(vectors(400), tokens(400), mode).report
    assert uneven.losses["load"] > 0.01
    assert uneven.losses["importance"] > 0.05


def test_the_load_loss_moves_both_gates_and_both_noises() -> None:
    built = layer(hierarchy(3, 2, 2, balance=Balance(losses=(LoadLoss(),))))
    result = built(vectors(50), tokens(50, padding=5), LayerMode(training=True))
    result.report.losses["load"].backward()
    gradients = {name: parameter.grad for name, parameter in built.router.named_parameters()}
    assert set(gradients) == {"projection.weight", "noise.weight", "primary.weight", "primary_noise.weight"}
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert bool(gradient.isfinite().all())
        assert bool(gradient.any()), name


def test_padding_changes_no_load() -> None:
    built, x_TD = layer(hierarchy(3, 2, 2, balance=LOSSES)), vectors(20)
    padded_TD = torch.cat([x_TD, torch.full_like(x_TD[:6], 50.0)])
    plain, padded = (
        built.balance(routing, every, LayerMode(training=True)).losses
        for every, routing in (
            (every, built.router(x, None, every, LayerMode()))
            for x, every in ((x_TD, tokens(20)), (padded_TD, tokens(26, padding=6)))
        )
    )
    for name, value in plain.items():
        assert relative_error(padded[name], value) < 1e-5


def test_impossible_hierarchies_are_refused_with_a_reason() -> None:
    for shape in ((5, 2, 2), (4, 5, 1), (4, 2, 4)):
        with pytest.raises(ValueError, match="cannot be chosen from 12 experts"):
            hierarchy(*shape)
    with pytest.raises(ValueError, match="z-loss is always zero"):
        hierarchy(3, 2, 2, balance=Balance(losses=(ZLoss(),)))
