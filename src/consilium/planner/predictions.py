"""What published scaling laws say of a model: which N and E each of them means, and what it answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.planner.flops import flops
from consilium.planner.formulas import Abnar, Chinchilla, Clark, Joint, Kaplan, Krajewski, Leverage, Power
from consilium.planner.laws import Law
from consilium.planner.parameters import parameters
from consilium.records.prediction import Optimum, Prediction, Predictions, Slopes


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What laws are asked about: a model, or N and E alone. Parameters leave embeddings and head out."""

    active: float
    experts: float = 1.0
    """E: width of the experts over the width a token uses; E / k without shared experts, 1 when dense."""
    tokens: int | None = None
    total: float | None = None
    embeddings: float = 0.0
    """Input embedding and head; a tied one counts once."""
    granularity: float | None = None
    """Width a token uses over that of one expert: k without shared experts."""
    fineness: float | None = None
    """Twice the hidden size over the width of one expert."""
    training: float | None = None
    """Training operations a token."""

    @property
    def sparsity(self) -> float:
        """Share of the experts' width that a token leaves idle."""
        return 1 - 1 / self.experts


def point(model: Model, tokens: int | None = None) -> Point:
    """Return what laws ask of ``model``."""
    counts = parameters(model)
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tied else 2)
    body = Point(
        active=counts.active - embeddings,
        tokens=tokens,
        total=counts.total - embeddings,
        embeddings=embeddings,
        training=flops(model).training,
    )
    return body if model.moe is None else _routed(body, model.moe, model.hidden_size)


def _routed(body: Point, moe: MoE, hidden_size: int) -> Point:
    used = moe.active_experts * moe.width + moe.shared_width
    return dataclasses.replace(
        body,
        experts=(moe.experts * moe.width + moe.shared_width) / used,
        granularity=used / moe.width,
        fineness=2 * hidden_size / moe.width,
    )


def predict(asked: Sequence[Law], at: Point) -> Predictions:
    """Ask each law; those that lack something they need are listed with the reason."""
    answers = {law.name: answer(law, at) for law in asked}
    return Predictions(
        active=at.active,
        total=at.total,
        experts=at.experts,
        granularity=at.granularity,
        tokens=at.tokens,
        predictions=tuple(found for found in answers.values() if isinstance(found, Prediction)),
        unanswered={name: why for name, why in answers.items() if isinstance(why, str)},
    )


_NO_TOKENS = "needs --tokens"
_NO_MODEL = "needs a MODEL, because it counts idle experts too"
_NO_EXPERTS = "is about experts, and there are none"


def answer(law: Law, at: Point) -> Prediction | str:
    """What ``law`` predicts, or why it cannot."""
    blank = Prediction(law=law.name, paper=law.paper, counts=law.counts, notes=(law.fitted,))
    formula = law.formula
    if isinstance(formula, Clark):
        return _clark(blank, formula, at.active, at.experts)
    if isinstance(formula, Power) and formula.of == "parameters":
        slopes = Slopes(parameters=-formula.exponent)
        return dataclasses.replace(blank, parameters=at.active, loss=formula.loss(at.active), slopes=slopes)
    return _NO_TOKENS if at.tokens is None else _of_tokens(blank, formula, at, at.tokens)


def _of_tokens(
    blank: Prediction,
    formula: Power | Kaplan | Chinchilla | Joint | Krajewski | Abnar | Leverage,
    at: Point,
    tokens: int,
) -> Prediction | str:
    match formula:
        case Power():
            return dataclasses.replace(blank, tokens=tokens, loss=formula.loss(tokens))
        case Kaplan():
            return _dense(blank, formula, at.active, tokens)
        case Chinchilla():
            return _chinchilla(blank, formula, at.active + at.embeddings, tokens)
        case Joint():
            return _joint(blank, formula, at, tokens)
        case Krajewski():
            return _krajewski(blank, formula, at, tokens)
        case Abnar():
            return _abnar(blank, formula, at, tokens)
        case Leverage():
            return _leverage(blank, formula, at, tokens)


def _clark(blank: Prediction, clark: Clark, n: float, e: float) -> Prediction:
    return dataclasses.replace(
        blank,
        parameters=n,
        experts=e,
        loss=clark.loss(n, e),
        dense_loss=clark.loss(n),
        dense_equivalent=clark.effective_parameters(n, e),
        slopes=Slopes(parameters=clark.by_parameters(e), experts=clark.by_experts(n, e)),
        raw_slopes=Slopes(parameters=clark.raw_by_parameters(e), experts=clark.raw_by_experts(n)),
        notes=(*blank.notes, *_beyond(clark, n, e), *_quoted(clark, n, e)),
    )


def _beyond(clark: Clark, n: float, e: float) -> tuple[str, ...]:
    """Where a point leaves what the law was fitted to, and where by the law experts stop paying."""
    outside = not 15e6 <= n <= 1.3e9 or e > 512
    far = "this point lies outside, so the figures are an extrapolation"
    useless = f"beyond N = {_billions(clark.cutoff)} more experts do not lower the loss, by these constants"
    return (far,) * outside + (useless,) * (n > clark.cutoff)


QUOTED_N, QUOTED_E, QUOTED_SLOPE = 21e9, 8.0, -0.025
"""What articles print: at 21 B parameters and 8 experts the loss falls by 0.025 % for 1 % more experts."""


def _quoted(clark: Clark, n: float, e: float) -> tuple[str, ...]:
    if e != QUOTED_E or not math.isclose(n, QUOTED_N, rel_tol=0.03):
        return ()
    belongs, tenth = 10 ** ((QUOTED_SLOPE - clark.b) / clark.c), QUOTED_N / 10
    note = (
        f"articles quote {QUOTED_SLOPE} for this N and E, and b + c log N is {clark.raw_by_experts(n):.4f};"
        f" it is {clark.raw_by_experts(tenth):.4f} at N = {_billions(tenth)} and {QUOTED_SLOPE} at"
        f" {_billions(belongs)}"
    )
    return (note,)


def _billions(n: float) -> str:
    return f"{n / 1e9:.2g} B"


def _dense(blank: Prediction, form: Kaplan | Chinchilla, n: float, tokens: int) -> Prediction:
    return dataclasses.replace(
        blank,
        parameters=n,
        tokens=tokens,
        loss=form.loss(n, tokens),
        slopes=Slopes(parameters=elasticity(lambda size: form.loss(size, tokens), n)),
    )


def _chinchilla(blank: Prediction, form: Chinchilla, n: float, tokens: int) -> Prediction:
    size, data = form.optimum(6 * n * tokens)
    best = Optimum(parameters=size, tokens=data, loss=form.loss(size, data))
    return dataclasses.replace(_dense(blank, form, n, tokens), optimum=best)


def _joint(blank: Prediction, joint: Joint, at: Point, tokens: int) -> Prediction:
    n = at.active + at.embeddings
    loss = joint.loss(n, tokens, at.experts)
    return dataclasses.replace(
        blank,
        parameters=n,
        experts=at.experts,
        tokens=tokens,
        loss=loss,
        dense_loss=joint.loss(n, tokens),
        dense_equivalent=size_of_loss(lambda size: joint.loss(size, tokens), loss),
        slopes=Slopes(
            parameters=elasticity(lambda size: joint.loss(size, tokens, at.experts), n),
            experts=elasticity(lambda e: joint.loss(n, tokens, e), at.experts),
        ),
    )


def _krajewski(blank: Prediction, form: Krajewski, at: Point, tokens: int) -> Prediction | str:
    total, grain = at.total, at.granularity
    if total is None:
        return _NO_MODEL
    if grain is None:
        return _NO_EXPERTS
    loss = form.loss(total, tokens, grain)
    here = (
        ()
        if math.isclose(at.experts, 64)
        else (f"here E = {at.experts:.3g}, so the figures are an extrapolation",)
    )
    return dataclasses.replace(
        blank,
        parameters=total,
        experts=at.experts,
        granularity=grain,
        tokens=tokens,
        loss=loss,
        dense_loss=form.dense.loss(at.active, tokens),
        dense_equivalent=size_of_loss(lambda n: form.dense.loss(n, tokens), loss),
        slopes=Slopes(parameters=elasticity(lambda n: form.loss(n, tokens, grain), total)),
        notes=(*blank.notes, *here),
    )


def _abnar(blank: Prediction, abnar: Abnar, at: Point, tokens: int) -> Prediction | str:
    total = at.total
    if total is None:
        return _NO_MODEL
    loss = abnar.loss(total, tokens, at.sparsity)
    turned = (
        "at this size its constants make idle experts better than used ones, so its dense figures mislead"
    )
    return dataclasses.replace(
        blank,
        parameters=total,
        experts=at.experts,
        tokens=tokens,
        loss=loss,
        dense_loss=abnar.loss(at.active, tokens),
        dense_equivalent=size_of_loss(lambda n: abnar.loss(n, tokens), loss),
        slopes=Slopes(parameters=elasticity(lambda n: abnar.loss(n, tokens, at.sparsity), total)),
        notes=(*blank.notes, *(() if abnar.sparsity_costs(total, 0) else (turned,))),
    )


def _leverage(blank: Prediction, form: Leverage, at: Point, tokens: int) -> Prediction | str:
    if at.training is None:
        return _NO_MODEL
    if at.fineness is None:
        return _NO_EXPERTS
    return dataclasses.replace(
        blank,
        experts=at.experts,
        granularity=at.fineness,
        tokens=tokens,
        leverage=form.ratio(1 / at.experts, at.fineness, tokens * at.training),
        notes=(*blank.notes, f"greatest at G = {form.best_granularity:.1f}, by these constants"),
    )


_STEP = 1e-4
_LARGEST = 20.0


def elasticity(loss: Callable[[float], float], x: float) -> float:
    """Slope d log L / d log x by central difference: about eight digits for laws as smooth as these."""
    return math.log(loss(x * math.exp(_STEP)) / loss(x * math.exp(-_STEP))) / (2 * _STEP)


def size_of_loss(loss: Callable[[float], float], wanted: float) -> float | None:
    """N at which a falling ``loss`` is ``wanted``, by halving log N; None beyond 10^20."""
    low, high = 0.0, _LARGEST
    if loss(10**high) > wanted:
        return None
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(10**middle) > wanted else (low, middle)
    return 10**high
