"""A suite that passes proves little until it is seen to fail: known mistakes, one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium.conformance import suite as conformance
from consilium.conformance.suite import Vectors, Verdict
from consilium.moe import admission
from consilium.moe.routing import gate, select
from consilium.moe.routing.router import Router
from consilium.moe.types import Routing

VECTORS = {vectors.model: vectors for vectors in conformance.shipped()}


def with_rules(model: str, **rules: str) -> Verdict:
    """Check a system whose configuration has other rules; keys have two underscores for a dot."""
    vectors = VECTORS[model]
    sizes = {**vectors.sizes, **{key.replace("__", "."): text for key, text in rules.items()}}
    return conformance.check(dataclasses.replace(vectors, sizes=sizes))


@pytest.mark.parametrize(
    ("model", "rules"),
    [
        ("deepseek-v3:671b", {"router__select__groups__score": "max"}),
        ("deepseek-v2:236b", {"router__select__groups__score": "top2_sum"}),
        ("deepseek-v3:671b", {"router__select__groups__keep": "8"}),
        ("deepseek-v3:671b", {"router__score": "{kind: softmax}"}),
        ("deepseek-v3:671b", {"router__weight": "{kind: raw}"}),
        ("deepseek-v3:671b", {"router__scale": "1.0"}),
        ("deepseek-v3:671b", {"router__offset": "none", "balance__bias": "{kind: none}"}),
        ("deepseek-v3:671b", {"router__offset": "logits"}),
        ("deepseek-v2:236b", {"router__scale": "1.0"}),
        ("deepseek-v2:lite", {"router__weight": "{kind: normalised}"}),
        ("mixtral:8x7b", {"router__weight": "{kind: raw}"}),
        ("qwen-moe:a2.7b", {"router__weight": "{kind: normalised}"}),
        ("qwen3-moe:235b", {"router__weight": "{kind: raw}"}),
        ("grok-1:314b", {"router__weight": "{kind: softmax_of_selected}"}),
        ("skywork-moe:146b", {"router__transforms": "[]"}),
        ("skywork-moe:146b", {"router__transforms": "[{kind: standardise, scale: 2.0}]"}),
        ("skywork-moe:146b", {"balance__losses": "[{kind: switch}]"}),
        ("llama-moe:3.0b-2-16", {"router__scale": "1.0"}),
        ("gshard:600b", {"balance__losses": "[{kind: switch, counts: all}]"}),
        ("gshard:600b", {"admission__by": "probability"}),
        ("shazeer:256", {"router__weight": "{kind: raw}"}),
        ("expert-choice:8b-64e", {"router__weight": "{kind: normalised}"}),
        ("latent-moe", {"router__scale": "1.0"}),
    ],
)
def test_another_rule_is_noticed(model: str, rules: dict[str, str]) -> None:
    assert not with_rules(model, **rules).passed


def test_the_same_rule_spelt_differently_is_not_an_error() -> None:
    """Softmax over the best two logits is the softmax divided by their sum."""
    assert with_rules("mixtral:8x7b", router__weight="{kind: normalised}").passed
    assert with_rules("mixtral:8x7b", router__weight="{kind: softmax_of_selected}").passed


def zero_mask(values_TE: Tensor, groups: Any) -> Tensor:
    """0.0 in place of -inf: with negative biases a closed expert beats an open one."""
    open_TE = select_in_best_groups(values_TE, groups)
    return open_TE.masked_fill(open_TE == -torch.inf, 0.0)


select_in_best_groups = select._in_best_groups
router_forward = Router.forward


def biased_weights(self: Router, x_TD: Tensor, bias_E: Tensor | None, *rest: Any) -> Routing:
    """The bias enters the weight as well as the selection."""
    routing = router_forward(self, x_TD, bias_E, *rest)
    if bias_E is None:
        return routing
    weights_TK = (routing.scores_TE + bias_E).gather(1, routing.experts_TK) * routing.keep_TK
    weights_TK = weights_TK / weights_TK.sum(1, keepdim=True) * self.config.scale
    return dataclasses.replace(routing, weights_TK=weights_TK)


def bfloat16_gate(self: gate.Gate, x_TD: Tensor) -> Tensor:
    return torch.nn.functional.linear(x_TD.bfloat16(), self.weight.bfloat16()).float()


def highest_number_first(values_NM: Tensor, k: int) -> Tensor:
    """Ties to the higher column."""
    columns = values_NM.shape[1]
    return columns - 1 - values_NM.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :k]


def counts_padding(factor: float, tokens_G: Tensor, k: int, experts: int) -> Tensor:
    return admission_capacities(factor, tokens_G + 1, k, experts)


admission_capacities = admission.capacities


@pytest.mark.parametrize(
    ("model", "where", "name", "mistake", "seen_in"),
    [
        ("deepseek-v3:671b", select, "_in_best_groups", zero_mask, "negative biases"),
        ("deepseek-v3:671b", Router, "forward", biased_weights, "biases of both signs"),
        ("deepseek-v3:671b", gate.Gate, "forward", bfloat16_gate, "a gate matrix"),
        ("mixtral:8x7b", gate.Gate, "forward", bfloat16_gate, "ordinary"),
        ("mixtral:8x7b", select, "highest", highest_number_first, "ties"),
        ("deepseek-v2:236b", select, "highest", highest_number_first, "uniform"),
        ("gshard:600b", admission, "capacities", counts_padding, "crowded"),
        ("switch:c", admission, "capacities", counts_padding, "crowded"),
    ],
)
def test_a_mistake_in_the_code_is_noticed_where_it_shows(
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    where: object,
    name: str,
    mistake: Callable[..., object],
    seen_in: str,
) -> None:
    monkeypatch.setattr(where, name, mistake)
    verdict = conformance.check(VECTORS[model])
    assert not verdict.passed
    assert any(seen_in in text for text in verdict.differences), verdict.differences


def altered(vectors: Vectors, **changes: object) -> Verdict:
    first = dataclasses.replace(vectors.cases[0], **changes)
    return conformance.check(dataclasses.replace(vectors, cases=(first, *vectors.cases[1:])))


def test_every_part_of_an_expectation_is_compared() -> None:
    vectors = VECTORS["gshard:600b"]
    case = vectors.cases[0]
    other = tuple(tuple((e + 1) % 8 for e in row) for row in case.experts_TK)
    moved = tuple(tuple(w + 2e-6 for w in row) for row in case.weights_TK)
    refused = tuple(tuple(not fits for fits in row) for row in case.admitted_TK)
    assert "uses experts" in altered(vectors, experts_TK=other).differences[0]
    assert "weights are off by 2.0e-06" in altered(vectors, weights_TK=moved).differences[0]
    assert "admits" in altered(vectors, admitted_TK=refused).differences[0]
    assert "loads are" in altered(vectors, load_E=(99,) * 8).differences[0]
    losses = {name: value * 1.0001 for name, value in case.losses.items()}
    assert "loss switch" in altered(vectors, losses=losses).differences[0]
    assert "loss z is nan" in altered(vectors, losses={**case.losses, "z": 1.0}).differences[0]


def test_a_weight_that_is_nan_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(self: Router, *rest: Any) -> Routing:
        routing = router_forward(self, *rest)
        return dataclasses.replace(routing, weights_TK=routing.weights_TK * torch.nan)

    monkeypatch.setattr(Router, "forward", poisoned)
    verdict = conformance.check(VECTORS["mixtral:8x7b"])
    assert not verdict.passed
    assert verdict.weight_error == torch.inf
