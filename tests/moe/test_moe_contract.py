"""The hard cases of the contract: each runs through the one layer without a special case in it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from consilium.config.balance import (
    Balance,
    CommunicationLoss,
    ImportanceLoss,
    SequenceLoss,
    SwitchLoss,
)
from consilium.config.moe import Capacity, DeviceCapacity
from consilium.config.router import LearnedNoise, NoGate, Raw, Router, SampledSecond, TopK
from consilium.errors import ConsiliumError
from consilium.moe.adaptive_mixture import AdaptiveMixture
from consilium.moe.types import (
    CONSIDERED,
    KEPT,
    WANTED,
    Activations,
    LayerMode,
    LayerObserver,
    Override,
    Replay,
    Routing,
    Tokens,
)
from consilium.ops.rows import Rows
from moe.cases import DROPPING, EXPERTS, SYSTEMS, layer, moe, tokens, vectors
from support import relative_error


@dataclass
class Notes:
    """What an observer sees, in order."""

    routings: list[tuple[int, Routing, Tokens]] = field(default_factory=list)
    passes: list[tuple[int, Rows, Activations]] = field(default_factory=list)

    def routing(self, layer: int, routing: Routing, tokens: Tokens) -> None:
        self.routings.append((layer, routing, tokens))

    def rows(self, layer: int, rows: Rows, activations: Activations) -> None:
        self.passes.append((layer, rows, activations))


def test_hash_routing_reads_ids_and_nothing_else() -> None:
    built, every = layer(SYSTEMS["hash"]), tokens(30)
    one, two = (built(vectors(30, seed), every, LayerMode()).routing for seed in (1, 2))
    assert torch.equal(one.experts_TK, two.experts_TK)
    same_T = every.ids_T == every.ids_T[0]
    assert (one.experts_TK[same_T] == one.experts_TK[0]).all()


def test_expert_choice_gives_every_expert_its_fill_and_tokens_what_is_left() -> None:
    report = layer(SYSTEMS["expert choice"])(vectors(32), tokens(32), LayerMode()).report
    assert report.load_E.tolist() == [8] * EXPERTS
    assert int(report.dropped) == 0


def test_relu_routing_uses_as_many_experts_as_are_positive() -> None:
    routing = layer(SYSTEMS["relu"])(vectors(64), tokens(64), LayerMode()).routing
    positive_T = (routing.scores_TE > 0).sum(dim=1)
    assert torch.equal(routing.keep_TK.sum(dim=1), positive_T.clamp(max=5))
    assert positive_T.unique().numel() > 2


LOSSES = (
    SwitchLoss(coefficient=1.0),
    SequenceLoss(coefficient=1.0),
    CommunicationLoss(devices=4, most=2, coefficient=1.0),
    ImportanceLoss(coefficient=1.0),
)
TIGHT = [Capacity(factor=0.5), DeviceCapacity(devices=4, factor=0.5, exempt=0.3)]


def noisy(seed: int, override: Override = Override()) -> LayerMode:
    return LayerMode(training=True, generator=torch.Generator().manual_seed(seed), override=override)


@pytest.mark.parametrize("admission", [None, *TIGHT], ids=["own admission", "capacity", "devices"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_replay_of_a_decision_repeats_outputs_losses_and_gradients(
    name: str, admission: Capacity | DeviceCapacity | None
) -> None:
    """In training too, after drops: weights were normalised and losses counted before them."""
    config = SYSTEMS[name]
    losses = () if isinstance(config.router.projection, NoGate) else LOSSES
    config = replace(
        config,
        admission=admission or config.admission,
        balance=replace(config.balance, losses=losses),
    )
    built, every, x_TD = layer(config), tokens(40, sequences=6, padding=3), vectors(40).requires_grad_()
    first = built(x_TD, every, noisy(4))
    again = built(x_TD, every, noisy(4, first.routing.replay()))
    if name != "expert choice" and (name in DROPPING or admission is not None):
        assert int(first.report.dropped) > 0
    assert torch.equal(again.y_TD, first.y_TD)
    assert torch.equal(again.report.load_E, first.report.load_E)
    assert torch.equal(again.report.wanted_E, first.report.wanted_E)
    assert again.report.losses == first.report.losses
    one, two = (
        torch.autograd.grad(r.y_TD.square().sum() + sum(r.report.losses.values()), [x_TD, built.experts.up])
        for r in (first, again)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_replay_of_its_replay_is_the_same() -> None:
    config = replace(SYSTEMS["gshard"], admission=TIGHT[0])
    built, every, x_TD = layer(config), tokens(40), vectors(40)
    first = built(x_TD, every, noisy(4)).routing
    again = built(x_TD, every, noisy(5, first.replay())).routing
    one, two = (routing.replay().replay for routing in (first, again))
    assert torch.equal(one.experts_TK, two.experts_TK)
    assert torch.equal(one.reached_TK, two.reached_TK)
    assert one.reached_TK.dtype == torch.uint8
    assert one.reached_TK.unique().tolist() == [CONSIDERED, WANTED, KEPT]


def test_muting_narrows_a_replay() -> None:
    built, every, x_TD = layer(SYSTEMS["gshard"]), tokens(40), vectors(40)
    first = built(x_TD, every, noisy(4)).routing
    mute_TE = torch.zeros(1, EXPERTS, dtype=torch.bool)
    mute_TE[0, 3] = True
    again = built(x_TD, every, noisy(4, replace(first.replay(), mute_TE=mute_TE))).routing
    assert torch.equal(again.keep_TK, first.keep_TK & (first.experts_TK != 3))


T = 10
WRONG = {
    "k_T": Override(k_T=torch.ones(T - 1, dtype=torch.int64)),
    "mute_TE": Override(mute_TE=torch.zeros(T + 1, EXPERTS, dtype=torch.bool)),
    "replay": Override(replay=Replay.of(torch.zeros(1, 3, dtype=torch.int64))),
    "replay needs": Override(
        replay=Replay(torch.zeros(T, 3, dtype=torch.int64), torch.ones(T, 2, dtype=torch.uint8))
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_override_of_another_length_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(ConsiliumError, match=rf"override\.{name} "):
        layer(SYSTEMS["deepseek-v3"])(vectors(T), tokens(T), LayerMode(override=WRONG[name]))


def test_one_budget_stands_for_all_tokens() -> None:
    built, every, x_TD = layer(SYSTEMS["qwen2-moe"]), tokens(T), vectors(T)
    one, many = (
        built(x_TD, every, LayerMode(override=Override(k_T=torch.full((count,), 2)))).y_TD for count in (1, T)
    )
    assert torch.equal(one, many)


def test_replay_recomputes_weights_from_the_live_scores_with_gradient() -> None:
    built, every, x_TD = layer(SYSTEMS["deepseek-v3"]), tokens(10), vectors(10)
    experts_TK = vectors(10, seed=8, hidden=EXPERTS).argsort(dim=1)[:, :3]
    routing = built(x_TD, every, LayerMode(override=Override(replay=Replay.of(experts_TK)))).routing
    scores_TK = torch.sigmoid(x_TD @ built.router.projection.weight.T).gather(1, experts_TK)
    assert torch.equal(routing.experts_TK, experts_TK)
    assert relative_error(routing.weights_TK, 2.5 * scores_TK / scores_TK.sum(dim=1, keepdim=True)) < 1e-6
    coefficient = vectors(10, seed=9, hidden=3)
    (gradient,) = torch.autograd.grad(
        (routing.weights_TK * coefficient).sum(), built.router.projection.weight
    )
    assert gradient.any()


def test_an_observer_gets_what_gptq_needs() -> None:
    """Inputs and hidden activations of every expert's own rows: its Hessians are sums of their products."""
    built, every, x_TD = layer(SYSTEMS["deepseek-v3"]), tokens(20, padding=2), vectors(20)
    notes = Notes()
    observed = built(x_TD, every, LayerMode(observer=LayerObserver(notes, 0)))
    assert relative_error(observed.y_TD, built(x_TD, every, LayerMode()).y_TD) < 1e-6
    ((index, rows, activations),) = notes.passes
    assert index == 0
    ends = torch.tensor(rows.counts_E).cumsum(0).tolist()
    routing = observed.routing
    for e, (end, count) in enumerate(zip(ends, rows.counts_E, strict=True)):
        mine_T = ((routing.experts_TK == e) & routing.keep_TK).any(dim=1)
        x_eD, hidden_eF = x_TD[mine_T], activations.hidden_RF[end - count : end]
        input_eD = activations.input_RD[end - count : end]
        hessian = input_eD.T @ input_eD
        assert relative_error(hessian, x_eD.T @ x_eD) < 1e-6
        gate, up = (x_eD @ built.experts.up[e].T).chunk(2, dim=1)
        assert relative_error(hidden_eF, torch.nn.functional.silu(gate) * up) < 1e-5
        output_eD = activations.output_RD[end - count : end]
        assert relative_error(output_eD, hidden_eF @ built.experts.down[e].T) < 1e-5


def test_an_observer_sees_the_routing_as_admitted() -> None:
    router = Router(select=TopK(k=2))
    built = layer(moe(router, admission=Capacity(factor=0.5, scope="always")))
    every, notes = tokens(20), Notes()
    result = built(vectors(20), every, LayerMode(observer=LayerObserver(notes, 0)))
    ((index, routing, seen),) = notes.routings
    assert index == 0
    assert routing is result.routing
    assert seen is every
    assert int(result.report.dropped) > 0
    assert torch.equal(routing.load_E(), result.report.load_E)


def test_the_mixture_of_jacobs_is_the_layer_with_every_expert_kept() -> None:
    """One router serves both: the gate of AdaptiveMixture decides as a dense layer's does."""
    mixture = AdaptiveMixture(12, 2, EXPERTS)
    built = layer(moe(Router(select=TopK(k=EXPERTS), weight=Raw())))
    with torch.no_grad():
        mixture.router.projection.weight.copy_(built.router.projection.weight)
    x_TD, every = vectors(9), tokens(9)
    gate = mixture(x_TD, every, LayerMode()).routing
    dense = built(x_TD, every, LayerMode()).routing
    assert torch.equal(gate.experts_TK, dense.experts_TK)
    assert torch.equal(gate.weights_TK, dense.weights_TK)
    assert gate.load_E().tolist() == [9] * EXPERTS


def test_losses_read_the_decision_before_drops() -> None:
    """Otherwise a capacity would hide the imbalance that the loss is there to remove."""
    router = Router(select=TopK(k=2))
    balance = Balance(losses=(SwitchLoss(),))
    reports = [
        layer(moe(router, balance=balance, **extra))(vectors(40), tokens(40), LayerMode(training=True)).report
        for extra in ({}, {"admission": Capacity(factor=0.5)})
    ]
    assert int(reports[1].dropped) > 0
    assert torch.equal(reports[0].losses["switch"], reports[1].losses["switch"])
    assert torch.equal(reports[0].wanted_E, reports[1].wanted_E)


@pytest.mark.parametrize(
    "router",
    [Router(noise=LearnedNoise(), select=TopK(k=2)), Router(select=SampledSecond())],
    ids=["noise", "sampled second"],
)
def test_chance_belongs_to_the_generator_of_the_mode(router: Router) -> None:
    built, every, x_TD = layer(moe(router)), tokens(50), vectors(50)
    before = torch.get_rng_state()
    results = [
        built(x_TD, every, LayerMode(training=True, generator=torch.Generator().manual_seed(seed)))
        for seed in (4, 4, 5)
    ]
    assert torch.equal(results[0].y_TD, results[1].y_TD)
    assert not torch.equal(results[0].y_TD, results[2].y_TD)
    assert torch.equal(before, torch.get_rng_state())
