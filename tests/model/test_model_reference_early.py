"""The early systems are their single-file references: logits, every loss, every gradient, draws given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from consilium.model.decoder import Decoder
from consilium.model.types import Inputs, Options, Output
from model.reference_cases import (
    LAYOUTS,
    TOLERANCE,
    Rows,
    batch_of,
    built,
    referred,
    referred_logits_and_total,
    rows_of,
    single_experts,
    training_with_noise,
    wrong,
)
from model.reference_cases_early import SYSTEMS, VARIANTS, model_of, outcomes, reference_of, uniform_of
from reference import gshard
from support import relative_error

MAIN = [system for system in SYSTEMS if system not in VARIANTS]

cases = pytest.mark.parametrize(
    ("system", "layout", "dtype"),
    [(system, layout, torch.float64) for system in MAIN for layout in LAYOUTS]
    + [(system, "packed documents", torch.float64) for system in VARIANTS]
    + [(system, "packed documents", torch.float32) for system in MAIN],
)

NUMBERS = [
    ("dense-moe", {"theta": 10.0}),
    ("jacobs", {"theta": 10.0}),
    ("shazeer", {"k": 2}),
    ("shazeer", {"importance_loss": 0.0}),
    ("shazeer", {"load_loss": 0.0}),
    ("shazeer-hierarchical", {"k": 2}),
    ("shazeer-hierarchical", {"keep_groups": 1}),
    ("shazeer-hierarchical", {"importance_loss": 0.0}),
    ("shazeer-hierarchical", {"load_loss": 0.0}),
    ("gshard", {"capacity": None}),
    ("gshard", {"group_tokens": None}),
    ("gshard", {"switch_loss": 0.0}),
    ("gshard-full", {"capacity": 1.0}),
    ("hash", {"norm_epsilon": 1e-2}),
    ("expert-choice", {"choice_factor": 1.0}),
]


@cases
def test_logits_are_the_references(system: str, layout: str, dtype: torch.dtype) -> None:
    ours, expected = outcomes(system, layout, dtype)
    assert relative_error(ours.logits_TV, expected.logits_TV) < TOLERANCE[dtype]


@cases
def test_every_loss_and_their_sum_is_the_references(system: str, layout: str, dtype: torch.dtype) -> None:
    ours, expected = outcomes(system, layout, dtype)
    assert not wrong(ours.losses, expected.losses, TOLERANCE[dtype])
    assert relative_error(ours.total, expected.total) < TOLERANCE[dtype]


@cases
def test_every_gradient_is_the_references(system: str, layout: str, dtype: torch.dtype) -> None:
    ours, expected = outcomes(system, layout, dtype)
    assert not wrong(ours.gradients, expected.gradients, TOLERANCE[dtype])


@cases
def test_the_gradient_of_each_single_expert_is_the_references(
    system: str, layout: str, dtype: torch.dtype
) -> None:
    ours, expected = outcomes(system, layout, dtype)
    mine, theirs = single_experts(ours.gradients), single_experts(expected.gradients)
    assert not wrong(mine, theirs, TOLERANCE[dtype])


def agree(model: Decoder, rows: Rows) -> None:
    """A training pass of the model and of its reference have the same values and gradients."""
    ours, expected = built(model, rows, training_with_noise), referred(model, rows, reference_of(model, rows))
    tolerance = TOLERANCE[torch.float64]
    assert relative_error(ours.logits_TV, expected.logits_TV) < tolerance
    assert not wrong(ours.losses, expected.losses, tolerance)
    assert not wrong(ours.gradients, expected.gradients, tolerance)
    mine, theirs = single_experts(ours.gradients), single_experts(expected.gradients)
    assert not wrong(mine, theirs, tolerance)


@pytest.mark.parametrize("system", SYSTEMS)
def test_fewer_tokens_than_experts_have_the_references_values_and_gradients(system: str) -> None:
    """Experts that no token chose get exactly zero."""
    agree(model_of(system), rows_of([[3], [2]]))


@pytest.mark.parametrize(
    "system", ["dense-moe", "shazeer", "shazeer-hierarchical", "gshard", "expert-choice"]
)
def test_routers_of_zeros_have_the_references_values_and_gradients(system: str) -> None:
    """As Shazeer's start: without noise all scores are equal, and the first expert or token goes first."""
    model = model_of(system)
    for layer in model.moe_modules().values():
        for parameter in layer.router.parameters():
            parameter.data.zero_()
    agree(model, rows_of(LAYOUTS["right padding"]))


@pytest.mark.parametrize("layout", ["packed documents", "right padding"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_evaluation_has_no_noise_drops_or_losses_and_the_references_logits(system: str, layout: str) -> None:
    model, rows = model_of(system), rows_of(LAYOUTS[layout])
    batch = batch_of(rows)
    with torch.no_grad():
        output = model(Inputs.of(batch))
    expected_TV, _ = referred_logits_and_total(model, rows, reference_of(model), capacity=None)
    assert relative_error(output.logits[batch.valid_BS], expected_TV) < 1e-6
    assert not any(int(report.dropped) for report in output.reports.values())
    assert not any(report.losses for report in output.reports.values())


@pytest.mark.parametrize(("system", "change"), NUMBERS)
def test_every_number_of_an_early_system_decides_something(system: str, change: dict[str, Any]) -> None:
    model, rows = model_of(system), rows_of(LAYOUTS["packed documents"])
    reference = reference_of(model, rows)
    _, usual = referred_logits_and_total(model, rows, reference)
    _, changed = referred_logits_and_total(model, rows, reference, **change)
    assert relative_error(changed, usual) > 1e-5


def trained(system: str) -> Output:
    """A training pass over whole rows, in which every token is valid."""
    with torch.no_grad():
        batch = batch_of(rows_of(LAYOUTS["whole rows"]))
        return model_of(system)(Inputs.of(batch), options=training_with_noise())


@pytest.mark.parametrize("system", ["gshard", "gshard-full"])
def test_gshard_rejects_and_drops_second_choices(system: str) -> None:
    output = trained(system)
    for report in output.reports.values():
        assert int(report.wanted_E.sum()) <= 0.95 * 2 * int(report.tokens)
        assert int(report.dropped) >= 0.05 * int(report.wanted_E.sum())


def used(gates_TE: Tensor, drawn_T: Tensor, **form: bool) -> set[tuple[int, int]]:
    """Tokens and experts that Algorithm 1 brings together, in local groups of six."""
    pairs = set()
    for first in range(0, len(gates_TE), 6):
        here = slice(first, first + 6)
        copies = gshard.dispatch(gates_TE[here], drawn_T[here], {"capacity": 1.0, **form})
        pairs |= {(first + s, expert) for s, expert, _ in copies}
    return pairs


def test_second_choices_that_the_draw_rejects_take_their_place_as_printed() -> None:
    """Released code does not count them, and drops less."""
    model, more = model_of("gshard"), []
    for seed in range(8):
        rows = rows_of(LAYOUTS["whole rows"], seed)
        routings = model(Inputs.of(batch_of(rows)), options=training_with_noise()).routings
        draws = uniform_of(model.config, rows)
        for layer, routing in routings.items():
            gates_TE, (token_X, choice_X) = routing.scores_TE.double(), routing.keep_TK.nonzero(as_tuple=True)
            ours = set(zip(token_X.tolist(), routing.experts_TK[token_X, choice_X].tolist(), strict=True))
            assert ours == used(gates_TE, draws[layer])
            more.append(len(used(gates_TE, draws[layer], released=True) - ours))
    assert sum(more) > 0


def test_the_loss_of_gshard_is_e_squared_times_the_printed_one_in_one_group() -> None:
    """With several groups the printed loss asks each for balance, so the two differ."""
    output = trained("gshard")
    for layer, report in output.reports.items():
        routing = output.routings[layer]
        gates_TE = routing.scores_TE.double()
        printed = gshard.auxiliary_loss(gates_TE)
        assert relative_error(report.losses["switch"], 0.5 * 8**2 * printed) < TOLERANCE[torch.float64]
        of_groups = torch.stack([gshard.auxiliary_loss(gates_SE) for gates_SE in gates_TE.split(8)]).mean()
        assert relative_error(of_groups, printed) > 1e-3


def test_the_printed_loss_of_gshard_at_balance_is_one_over_e_squared() -> None:
    gates_SE = 0.9 * torch.full((8, 8), 1 / 8, dtype=torch.float64) + 0.1 * torch.eye(8, dtype=torch.float64)
    assert gshard.auxiliary_loss(gates_SE).item() == pytest.approx(1 / 8**2, rel=1e-12)


def test_noise_sends_tokens_of_shazeer_to_other_groups_and_experts() -> None:
    batch = batch_of(rows_of(LAYOUTS["whole rows"]))
    for system in ("shazeer", "shazeer-hierarchical"):
        quiet = model_of(system)(Inputs.of(batch), options=Options(routings=True)).routings
        noisy = trained(system).routings
        for layer, before in quiet.items():
            after = noisy[layer]
            assert not before.experts_TK.equal(after.experts_TK)
            assert not (before.experts_TK // 2).equal(after.experts_TK // 2)


def test_expert_choice_gives_tokens_from_none_to_many_experts() -> None:
    for routing in trained("expert-choice").routings.values():
        used_T = routing.keep_TK.sum(1)
        assert int(used_T.max()) > 2
        assert int(used_T.min()) < 2
        assert routing.load_E().tolist() == [8] * 8


def test_hash_layers_have_nothing_to_learn_in_the_router() -> None:
    assert not [name for name, _ in model_of("hash").named_parameters() if ".router." in name]
