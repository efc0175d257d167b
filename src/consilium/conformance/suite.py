"""Golden vectors: what the router of every published system decides, and whether ours decides the same.

A file of vectors names a recipe and the few sizes that make it small enough to read; every rule is the
recipe's own. What is expected was made without this package: by the routers of transformers where it has
them, elsewhere by hand or by plain loops over numbers.

Legend: T tokens, D router inputs, E experts, K choices a token uses (each token has its own number).
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from pydantic.dataclasses import dataclass as checked
from torch import Tensor

from consilium.config import io
from consilium.config.base import STRICT
from consilium.config.moe import MoE
from consilium.moe.admission import admit
from consilium.moe.balance import Balance
from consilium.moe.routing.router import Router
from consilium.moe.types import LayerMode, Routing, Tokens
from consilium.recipes import catalogue

TOLERANCE: Final = 1e-6
"""Largest error of a weight: absolute up to 1, relative above (DeepSeek-V2 multiplies its weights by 16)."""
LOSS_TOLERANCE: Final = 1e-5
"""Largest relative error of a loss; one that is zero by its definition may be ``LOSS_ZERO``."""
LOSS_ZERO: Final = 1e-9

Rows = tuple[tuple[float, ...], ...]


@checked(frozen=True, kw_only=True, config=STRICT)
class Case:
    """One batch of tokens and what must come of it. Loads and losses are those of training, without noise."""

    name: str
    origin: str
    """Who says so."""
    x_TD: Rows
    parameters: Mapping[str, Rows] = field(default_factory=dict)
    """The router's matrices by name; a matrix that is not given is the identity, so that x is the logits."""
    bias_E: tuple[float, ...] | None = None
    valid_T: tuple[bool, ...] | None = None
    sequence_T: tuple[int, ...] | None = None
    sizes: Mapping[str, str] = field(default_factory=dict)
    """Sizes of this case alone."""
    experts_TK: tuple[tuple[int, ...], ...]
    """What each token uses, in falling order of preference; ties go to the lower number."""
    weights_TK: Rows
    admitted_TK: tuple[tuple[bool, ...], ...]
    """Which of these fit under the system's capacity in training."""
    load_E: tuple[int, ...]
    """Admitted copies an expert."""
    losses: Mapping[str, float]


@checked(frozen=True, kw_only=True, config=STRICT)
class Vectors:
    """All cases of one system."""

    model: str
    """The recipe and its size, ``deepseek-v3:671b``."""
    sizes: Mapping[str, str]
    """Dotted keys of its MoE layer and the small sizes they get."""
    cases: tuple[Case, ...]

    def moe(self, case: Case) -> MoE:
        """Return the recipe's MoE layer at the sizes of ``case``."""
        config = catalogue.recipe(self.model).moe
        assert config is not None, f"{self.model} routes nothing"
        return io.replace(config, {**self.sizes, **case.sizes}, where=f"{self.model}, {case.name}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one system did."""

    model: str
    cases: int
    choices: int
    """Expert numbers that were compared."""
    weight_error: float
    """Largest error of a weight, on the scale of ``TOLERANCE``."""
    differences: tuple[str, ...]
    """One sentence each; none when the system passed."""

    @property
    def passed(self) -> bool:
        return not self.differences


def shipped() -> tuple[Vectors, ...]:
    """Return the vectors that come with the package, in order of their names."""
    folder = importlib.resources.files("consilium.recipes") / "vectors"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda f: f.name)
    return tuple(io.from_json(Vectors, file.read_text("utf-8"), where=file.name) for file in files)


def check(vectors: Vectors) -> Verdict:
    """Run every case of a system through the router, admission and balance of this package."""
    differences: list[str] = []
    worst = 0.0
    for case in vectors.cases:
        outcome = decide(vectors.moe(case), case)
        differences += [f"{vectors.model}, {case.name}: {text}" for text in _differences(outcome, case)]
        worst = max(worst, _weight_error(outcome, case))
    choices = sum(len(row) for case in vectors.cases for row in case.experts_TK)
    return Verdict(vectors.model, len(vectors.cases), choices, worst, tuple(differences))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What this package decides, in the form of a case."""

    experts_TK: list[list[int]]
    weights_TK: list[list[float]]
    admitted_TK: list[list[bool]]
    load_E: list[int]
    losses: dict[str, float]


@torch.no_grad()
def decide(config: MoE, case: Case) -> Outcome:
    """Route without noise, then admit and balance as in training, whose drops and losses need no draw."""
    x_TD = torch.tensor(case.x_TD)
    tokens, router = _tokens(case), _router(config, case, x_TD.shape[1])
    training = LayerMode(training=True)
    bias_E = torch.zeros(config.experts) if case.bias_E is None else torch.tensor(case.bias_E)
    routing = router(x_TD, bias_E, tokens, LayerMode())
    admitted = admit(routing, tokens, config.admission, training)
    report = Balance(config.balance, config.router, config.experts)(admitted, tokens, training)
    return Outcome(
        experts_TK=_used(routing, routing.experts_TK),
        weights_TK=_used(routing, routing.weights_TK),
        admitted_TK=_used(routing, admitted.keep_TK),
        load_E=report.load_E.tolist(),
        losses={name: float(value) for name, value in report.losses.items()},
    )


def _used(routing: Routing, values_TK: Tensor) -> list[list[Any]]:
    """Rows of ``values_TK`` where the router uses its choice; rows may have different lengths."""
    return [row[keep].tolist() for row, keep in zip(values_TK, routing.keep_TK, strict=True)]


def _router(config: MoE, case: Case, inputs: int) -> Router:
    router = Router(config.router, inputs, config.experts)
    for name, parameter in router.named_parameters():
        given = case.parameters.get(name)
        parameter.copy_(_standard(parameter) if given is None else torch.tensor(given).view_as(parameter))
    if router.table is not None:
        router.table.copy_(torch.tensor(case.parameters["table"]))
    return router


def _standard(parameter: Tensor) -> Tensor:
    """The identity for a matrix, zeros for a vector of biases."""
    return torch.eye(*parameter.shape) if parameter.ndim == 2 else torch.zeros_like(parameter)


def _tokens(case: Case) -> Tokens:
    """Tokens whose identity is their place in the case; positions count inside each sequence."""
    count = len(case.x_TD)
    sequence_T = torch.tensor(case.sequence_T or [0] * count)
    valid_T = torch.tensor(case.valid_T or [True] * count)
    position_T = torch.arange(count) - torch.searchsorted(sequence_T, sequence_T)
    sequences = int(sequence_T.max()) + 1
    return Tokens(torch.arange(count), sequence_T, position_T, valid_T, sequences=sequences)


def _differences(outcome: Outcome, case: Case) -> Iterator[str]:
    """What differs, coarsest first: with other experts no weight or load can be right."""
    rows = list(zip(outcome.experts_TK, case.experts_TK, strict=True))
    for t, (actual, expected) in enumerate(rows):
        if tuple(actual) != expected:
            yield f"token {t} uses experts {actual} instead of {list(expected)}."
    if all(tuple(actual) == expected for actual, expected in rows):
        if not (error := _weight_error(outcome, case)) <= TOLERANCE:
            yield f"weights are off by {error:.1e}."
        if outcome.admitted_TK != [list(row) for row in case.admitted_TK]:
            yield f"admits {outcome.admitted_TK} instead of {[list(row) for row in case.admitted_TK]}."
        if tuple(outcome.load_E) != case.load_E:
            yield f"loads are {outcome.load_E} instead of {list(case.load_E)}."
    for name in sorted({*outcome.losses, *case.losses}):
        actual, expected = outcome.losses.get(name, math.nan), case.losses.get(name, math.nan)
        if not math.isclose(actual, expected, rel_tol=LOSS_TOLERANCE, abs_tol=LOSS_ZERO):
            yield f"loss {name} is {actual:.9g} instead of {expected:.9g}."


def _weight_error(outcome: Outcome, case: Case) -> float:
    """Largest error, relative above 1; infinite where the experts differ, and for NaN."""
    worst = 0.0
    for ids, weights, wanted, expected in zip(
        outcome.experts_TK, outcome.weights_TK, case.experts_TK, case.weights_TK, strict=True
    ):
        if tuple(ids) != wanted:
            return math.inf
        for actual, right in zip(weights, expected, strict=True):
            error = abs(actual - right) / max(1.0, abs(right))
            worst = max(worst, math.inf if math.isnan(error) else error)
    return worst
