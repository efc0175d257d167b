"""What scaling laws say of a model."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from consilium.records.io import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Slopes:
    """Elasticities: per cent that the loss changes by for one per cent more."""

    parameters: float | None = None
    """d log L / d log N."""
    experts: float | None = None
    """d log L / d log E."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Optimum:
    """Parameters and tokens of least loss for the same training compute, by the same law."""

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Prediction:
    """What one scaling law says of a model.

    Losses are nats a token of the law's own text: compare them within a law only.
    """

    law: str
    paper: str
    counts: str
    """What the law means by N."""
    parameters: float | None = None
    """N."""
    experts: float | None = None
    """E, experts for each active one."""
    granularity: float | None = None
    """G, in the law's own definition."""
    tokens: float | None = None
    """D, where the law has it."""
    loss: float | None = None
    dense_loss: float | None = None
    """Loss of a dense model of the same active parameters, by the same law."""
    dense_equivalent: float | None = None
    """Active parameters of the dense model of the same loss; None where no dense model reaches it."""
    leverage: float | None = None
    """Training compute of the dense model of the same loss over this model's."""
    slopes: Slopes | None = None
    """Derivatives of the law as printed, with its saturation in E."""
    raw_slopes: Slopes | None = None
    """Clark's a + c log E and b + c log N, which leave the saturation out."""
    optimum: Optimum | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Predictions:
    """What every law asked about answered, and why others could not."""

    active: float
    """Parameters a token uses, without embeddings and head."""
    total: float | None
    """All parameters, without embeddings and head; None when only N and E were given."""
    experts: float
    granularity: float | None
    """Expert widths that a token uses."""
    tokens: int | None
    predictions: tuple[Prediction, ...]
    unanswered: dict[str, str]
    """Reason by law."""
