"""The dense feed-forward network as data; experts have the same shape with a width of their own."""

from __future__ import annotations

from typing import Literal

from consilium.config.base import Size, configuration

Activation = Literal["swiglu", "geglu", "gelu", "relu", "squared_relu"]
GATED: frozenset[Activation] = frozenset({"swiglu", "geglu"})


def matrices(activation: Activation) -> int:
    """Matrices of a network: one up and one down, and one for the gate."""
    return 3 if activation in GATED else 2


@configuration
class FeedForward:
    """Two matrices, or three when the activation is gated, without biases."""

    width: Size
    activation: Activation = "swiglu"

    @property
    def matrices(self) -> int:
        return matrices(self.activation)
