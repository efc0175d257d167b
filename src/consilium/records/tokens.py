"""Which experts each token of some text uses, by layer: what a page of coloured tokens is drawn from."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from consilium.errors import ConsiliumError
from consilium.records.io import STRICT

Used = tuple[tuple[NonNegativeInt, ...], ...]
"""By token: the experts that it used, in falling order of preference."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReadPassage:
    """Text that was read in one piece."""

    domain: str
    pieces: tuple[str, ...]
    """By token; one that ends inside a character has none, and the next has all of it."""
    used: tuple[Used, ...]
    """By MoE layer."""

    def __post_init__(self) -> None:
        if any(len(layer) != len(self.pieces) for layer in self.used):
            raise ConsiliumError(f"a passage of {self.domain} has experts that do not fit its tokens")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokensRead:
    """What one model did with the text."""

    model: str
    experts: PositiveInt
    layers: tuple[NonNegativeInt, ...]
    """Block indices."""
    passages: tuple[ReadPassage, ...]

    def shares(self, place: int) -> tuple[float, ...]:
        """By expert: share of the tokens of which it is the first choice, in the ``place``-th MoE layer."""
        first = [used[0] for passage in self.passages for used in passage.used[place] if used]
        return tuple(first.count(expert) / max(len(first), 1) for expert in range(self.experts))

    def __post_init__(self) -> None:
        if any(len(passage.used) != len(self.layers) for passage in self.passages):
            raise ConsiliumError(f"{self.model} has passages that do not fit its {len(self.layers)} layers")
