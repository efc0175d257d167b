"""The dense feed-forward network as data; experts have the same shape with a width of their own."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from consilium.config.base import STRICT

Activation = Literal["swiglu", "geglu", "gelu", "relu", "squared_relu"]
GATED: frozenset[Activation] = frozenset({"swiglu", "geglu"})


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FeedForward:
    """Two matrices, or three when the activation is gated, without biases."""

    width: PositiveInt
    activation: Activation = "swiglu"

    @property
    def matrices(self) -> int:
        return 3 if self.activation in GATED else 2
