"""The modern systems are their single-file references: logits, every loss, every gradient, noise given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium.config.io import replace
from consilium.model.types import Inputs, Options
from consilium.moe.types import Counted, Mode
from model.reference_cases import (
    LAYOUTS,
    TOLERANCE,
    Rows,
    batch_of,
    built,
    documents_of,
    lively_model,
    referred,
    referred_logits_and_total,
    rows_of,
    single_experts,
    training_with_noise,
    wrong,
)
from model.reference_cases_modern import REFERENCES, SYSTEMS, model_of, outcomes, reference_of
from reference import qwen3_moe
from support import relative_error

cases = pytest.mark.parametrize(
    ("system", "layout", "dtype"),
    [(system, layout, torch.float64) for system in SYSTEMS for layout in LAYOUTS]
    + [(system, "packed documents", torch.float32) for system in SYSTEMS],
)

NUMBERS = [
    ("qwen2", {"theta": 10.0}),
    ("qwen2", {"norm_epsilon": 1e-2}),
    ("qwen3", {"theta": 10.0}),
    ("qwen3", {"norm_epsilon": 1e-2}),
    ("qwen-moe", {"k": 2}),
    ("qwen-moe", {"switch_loss": 0.0}),
    ("qwen3-moe", {"k": 2}),
    ("qwen3-moe", {"switch_loss": 0.0}),
    ("deepseek-moe", {"k": 2}),
    ("deepseek-moe", {"switch_loss": 0.0}),
    ("deepseek-moe", {"device_loss": 0.0}),
    ("deepseek-moe", {"devices": 2}),
    ("llama-moe", {"k": 1}),
    ("llama-moe", {"scale": 1.0}),
    ("llama-moe", {"noise_floor": 0.0}),
    ("llama-moe", {"importance_loss": 0.0}),
    ("llama-moe", {"load_loss": 0.0}),
    ("grok-1", {"k": 1}),
    ("grok-1", {"softcap": 30.0}),
    ("grok-1", {"embedding_scale": 1.0}),
    ("grok-1", {"logit_scale": 1.0}),
    ("skywork-moe", {"k": 1}),
    ("skywork-moe", {"standardise_scale": 1.0}),
    ("skywork-moe", {"standardise_epsilon": 0.0}),
    ("skywork-moe", {"capacity": None}),
    ("skywork-moe-by-probability", {"drop_by": "position"}),
    ("nemotron-moe", {"k": 2}),
    ("nemotron-moe", {"fraction": 1.0}),
    ("nemotron-moe", {"switch_loss": 0.0}),
    ("latent-moe", {"k": 2}),
    ("latent-moe", {"scale": 1.0}),
    ("latent-moe", {"sequence_loss": 0.0}),
]

RULES = [
    ("qwen2", "attention.qkv_bias", "false"),
    ("qwen3", "attention.qk_norm", "none"),
    ("qwen-moe", "moe.router.weight", "{kind: normalised}"),
    ("qwen3-moe", "moe.router.weight", "{kind: raw}"),
    ("deepseek-moe", "moe.router.weight", "{kind: normalised}"),
    ("llama-moe", "moe.router.weight", "{kind: raw}"),
    ("grok-1", "moe.router.weight", "{kind: normalised}"),
    ("grok-1", "moe.activation", "swiglu"),
    ("grok-1", "attention.softcap", "null"),
    ("grok-1", "norms", "before"),
    ("skywork-moe", "moe.router.transforms", "[]"),
    ("skywork-moe", "moe.router.weight", "{kind: raw}"),
    ("nemotron-moe", "moe.router.weight", "{kind: normalised}"),
    ("nemotron-moe", "moe.activation", "relu"),
    ("nemotron-moe", "attention.rope.fraction", "1.0"),
    ("latent-moe", "moe.router.weight", "{kind: raw}"),
    ("latent-moe", "moe.router.score", "{kind: softmax}"),
    ("latent-moe", "moe.router.offset", "logits"),
    ("latent-moe", "moe.activation", "relu"),
]


@cases
def test_logits_are_the_references(system: str, layout: str, dtype: torch.dtype) -> None:
    ours, expected = outcomes(system, layout, dtype)
    assert relative_error(ours.logits_TV, expected.logits_TV) < TOLERANCE[dtype]


@cases
def test_every_loss_and_their_sum_is_the_references(system: str, layout: str, dtype: torch.dtype) -> None:
    ours, expected = outcomes(system, layout, dtype)
    assert not wrong(ours.losses, expected.losses, TOLERANCE[dtype])
    assert all(float(loss) > 0 for loss in expected.losses.values())
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


@pytest.mark.parametrize("system", SYSTEMS)
def test_fewer_tokens_than_experts_have_the_references_values_and_gradients(system: str) -> None:
    """Experts that no token chose get exactly zero."""
    model, rows = model_of(system), rows_of([[2]])
    ours = built(model, rows, training_with_noise)
    expected = referred(model, rows, reference_of(model.config, rows))
    assert relative_error(ours.logits_TV, expected.logits_TV) < TOLERANCE[torch.float64]
    assert not wrong(ours.losses, expected.losses, TOLERANCE[torch.float64])
    assert not wrong(ours.gradients, expected.gradients, TOLERANCE[torch.float64])


@pytest.mark.parametrize("layout", ["packed documents", "right padding"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_evaluation_has_no_noise_drops_or_losses_and_the_references_logits(system: str, layout: str) -> None:
    model, rows = model_of(system), rows_of(LAYOUTS[layout])
    batch = batch_of(rows)
    with torch.no_grad():
        output = model(Inputs.of(batch))
    expected_TV, _ = referred_logits_and_total(model, rows, REFERENCES[model.config.family], capacity=None)
    assert relative_error(output.logits[batch.valid_BS], expected_TV) < 1e-6
    assert not any(int(report.dropped) for report in output.reports.values())
    assert not any(report.losses for report in output.reports.values())


def test_qwen3_counts_the_earlier_micro_batches_of_a_step_as_its_reference_does() -> None:
    """Loads so uneven that this micro-batch alone would give another loss."""
    model, rows = model_of("qwen3-moe"), rows_of(LAYOUTS["right padding"])
    earlier = {0: [40, 0, 3, 7, 0, 90, 1, 2], 1: [0, 5, 60, 0, 8, 1, 1, 70]}

    def reference(weights: Mapping[str, Tensor], hyper: Mapping[str, Any], rows: Rows) -> Any:
        return qwen3_moe.model(weights, hyper, documents_of(rows), earlier=earlier)

    mode = Mode(
        training=True,
        earlier={layer: Counted(torch.tensor(load), torch.tensor(0)) for layer, load in earlier.items()},
    )
    ours, expected = built(model, rows, lambda: Options(mode=mode)), referred(model, rows, reference)
    _, alone = outcomes("qwen3-moe", "right padding", torch.float64)
    assert relative_error(expected.losses["switch"], alone.losses["switch"]) > 1e-2
    assert not wrong(ours.losses, expected.losses, TOLERANCE[torch.float64])
    assert not wrong(ours.gradients, expected.gradients, TOLERANCE[torch.float64])


@pytest.mark.parametrize(("system", "change"), NUMBERS)
def test_every_number_of_a_modern_system_decides_something(system: str, change: dict[str, Any]) -> None:
    model, rows = model_of(system), rows_of(LAYOUTS["packed documents"])
    reference = reference_of(model.config, rows)
    _, usual = referred_logits_and_total(model, rows, reference)
    _, changed = referred_logits_and_total(model, rows, reference, **change)
    assert relative_error(changed, usual) > 1e-5


@pytest.mark.parametrize(("system", "key", "value"), RULES)
def test_every_rule_of_a_modern_system_decides_its_logits(system: str, key: str, value: str) -> None:
    """The same weights under another rule are further from the reference than any tolerance."""
    model, batch = model_of(system), batch_of(rows_of(LAYOUTS["packed documents"]))
    other = lively_model(replace(SYSTEMS[system], {key: value}))
    other.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        usual, changed = model(Inputs.of(batch)).logits, other(Inputs.of(batch)).logits
    assert relative_error(changed[batch.valid_BS], usual[batch.valid_BS]) > 1e-4


@pytest.mark.parametrize(("system", "least"), [("skywork-moe", 0.05), ("skywork-moe-by-probability", 0.3)])
def test_skywork_drops_in_training(system: str, least: float) -> None:
    model, batch = model_of(system), batch_of(rows_of(LAYOUTS["packed documents"]))
    reports = model(Inputs.of(batch), options=Options(mode=Mode(training=True))).reports
    assert all(int(report.dropped) >= least * int(report.wanted_E.sum()) for report in reports.values())


def test_noise_sends_tokens_of_llama_moe_to_other_experts() -> None:
    model, batch = model_of("llama-moe"), batch_of(rows_of(LAYOUTS["packed documents"]))
    clean = model(Inputs.of(batch), options=Options(routings=True)).routings
    noisy = model(Inputs.of(batch), options=training_with_noise()).routings
    for layer, before in clean.items():
        after = noisy[layer]
        assert not before.experts_TK[batch.valid_BS.flatten()].equal(
            after.experts_TK[batch.valid_BS.flatten()]
        )


def test_latent_moe_selects_with_biased_scores_of_both_signs() -> None:
    model = model_of("latent-moe")
    batch = batch_of(rows_of(LAYOUTS["whole rows"]))
    routings = model(Inputs.of(batch), options=Options(routings=True)).routings
    for layer, moe in model.moe_modules().items():
        routing, bias_E = routings[layer], moe.balance.bias_E
        assert bias_E is not None
        selected_TK = (routing.scores_TE + bias_E).gather(1, routing.experts_TK)
        assert bool((selected_TK < 0).any())
        assert bool((selected_TK > 0).any())
