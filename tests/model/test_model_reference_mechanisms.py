"""The small systems have every mechanism of the published ones at work, in training and in evaluation.

Legend: T valid tokens, D hidden size, E experts, K choices a token.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium.config.router import Jitter
from consilium.model.types import Inputs, Options
from consilium.moe.types import Mode
from consilium.recipes import catalogue
from model.reference_cases import (
    LAYOUTS,
    REFERENCES,
    SYSTEMS,
    Rows,
    batch_of,
    built,
    documents_of,
    drawn,
    lively_model,
    referred,
    referred_logits_and_total,
    rows_of,
    switch_config,
    training_with_noise,
)
from reference import switch
from support import relative_error

FOLDER = Path(__file__).parents[1] / "reference"

NUMBERS = [
    ("deepseek-v3", {"groups": 1, "keep_groups": 1}),
    ("deepseek-v3", {"scale": 1.0}),
    ("deepseek-v3", {"k": 2}),
    ("deepseek-v3", {"counts": "scores"}),
    ("deepseek-v3", {"sequence_loss": 0.0}),
    ("deepseek-v3", {"mtp_loss": 0.0}),
    ("deepseek-v3", {"mscale": 0.0}),
    ("deepseek-v3", {"factor": 4.0}),
    ("deepseek-v3", {"original_length": 10**6}),
    ("deepseek-v2", {"drops": False}),
    ("deepseek-v2", {"most_devices": 4}),
    ("deepseek-v2", {"scale": 1.0}),
    ("deepseek-v2", {"mscale": 1.0}),
    ("deepseek-v2", {"sequence_loss": 0.0}),
    ("deepseek-v2", {"device_loss": 0.0}),
    ("deepseek-v2", {"communication_loss": 0.0}),
    ("mixtral", {"k": 1}),
    ("mixtral", {"theta": 1e4}),
    ("mixtral", {"switch_loss": 0.0}),
    ("switch", {"capacity": None}),
    ("switch", {"capacity": 1.0}),
    ("switch", {"switch_loss": 0.0}),
    ("llama", {"theta": 1e6}),
    ("llama", {"norm_epsilon": 1e-2}),
]


@pytest.mark.parametrize(("system", "change"), NUMBERS)
def test_every_number_of_a_system_decides_something(system: str, change: dict[str, Any]) -> None:
    model, rows = lively_model(SYSTEMS[system]), rows_of(LAYOUTS["packed documents"])
    _, usual = referred_logits_and_total(model, rows)
    _, changed = referred_logits_and_total(model, rows, **change)
    assert relative_error(changed, usual) > 1e-5


def test_experts_are_selected_with_biased_scores_of_both_signs() -> None:
    """Groups masked with zero instead of -inf would win over the negative ones."""
    model = lively_model(SYSTEMS["deepseek-v3"])
    batch = batch_of(rows_of(LAYOUTS["whole rows"]))
    routings = model(Inputs.of(batch), options=Options(routings=True)).routings
    for layer, routing in routings.items():
        bias_E = model.moe_modules()[layer].balance.bias_E
        assert bias_E is not None
        selected_TK = (routing.scores_TE + bias_E).gather(1, routing.experts_TK)
        assert bool((selected_TK < 0).any())
        assert bool((selected_TK > 0).any())
        assert len(routing.experts_TK.unique()) >= 6


@pytest.mark.parametrize(("system", "least"), [("switch", 0.05), ("switch-full", 0.5), ("deepseek-v2", 0.05)])
def test_these_systems_drop_in_training(system: str, least: float) -> None:
    model, batch = lively_model(SYSTEMS[system]), batch_of(rows_of(LAYOUTS["packed documents"], 1))
    reports = model(Inputs.of(batch), options=Options(mode=Mode(training=True))).reports
    assert all(int(report.dropped) >= least * int(report.wanted_E.sum()) for report in reports.values())


@pytest.mark.parametrize("layout", ["packed documents", "right padding"])
@pytest.mark.parametrize("system", REFERENCES)
def test_evaluation_drops_nothing_and_has_the_references_logits(system: str, layout: str) -> None:
    model, rows = lively_model(SYSTEMS[system]), rows_of(LAYOUTS[layout])
    batch = batch_of(rows)
    with torch.no_grad():
        output = model(Inputs.of(batch))
    expected_TV, _ = referred_logits_and_total(model, rows, drops=False, capacity=None)
    assert relative_error(output.logits[batch.valid_BS], expected_TV) < 1e-6
    assert not any(int(report.dropped) for report in output.reports.values())
    assert not any(report.losses for report in output.reports.values())


def test_switch_with_a_given_jitter_is_the_references() -> None:
    """The router reads jittered tokens, the experts plain ones."""
    config = switch_config(1.25, noise=Jitter(epsilon=0.5))
    model, rows = lively_model(config), rows_of(LAYOUTS["right padding"])
    factors = drawn(
        config, rows, config.hidden_size, lambda zeros, own: zeros.uniform_(0.5, 1.5, generator=own)
    )

    def reference(weights: Mapping[str, Tensor], hyper: Mapping[str, Any], rows: Rows) -> Any:
        return switch.model(weights, hyper, documents_of(rows), jitter=factors)

    expected = referred(model, rows, reference)
    plain_TV, _ = referred_logits_and_total(model, rows)
    assert relative_error(expected.logits_TV, plain_TV) > 1e-3
    ours = built(model, rows, training_with_noise)
    assert relative_error(ours.logits_TV, expected.logits_TV) < 5e-6
    assert relative_error(ours.total, expected.total) < 5e-6
    assert all(
        relative_error(ours.gradients[name], gradient) < 5e-6 for name, gradient in expected.gradients.items()
    )


def test_every_recipe_has_a_reference_that_a_case_compares_with() -> None:
    cases = [ast.parse(path.read_text("utf-8")) for path in Path(__file__).parent.glob("reference_cases*.py")]
    nodes = [node for tree in cases for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    compared = {alias.name for node in nodes if node.module == "reference" for alias in node.names}
    assert {path.stem for path in FOLDER.glob("*.py")} == compared
    assert {name.replace("-", "_") for name in catalogue.names()} == compared


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_reference_is_short_and_stands_alone(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    nodes = list(ast.walk(ast.parse(text)))
    modules = [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported = {module.partition(".")[0] for module in modules}
    assert imported <= {"__future__", "collections", "math", "torch", "typing"}
