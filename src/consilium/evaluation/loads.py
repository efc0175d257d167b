"""How many tokens each expert got over several passes: training, evaluation and generation count alike.

Legend: E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from consilium.moe.types import Report


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """One layer's routing, summed over passes."""

    load_E: Tensor
    """int64 kept copies of each expert."""
    wanted_E: Tensor
    """int64 copies that the router chose before admission."""
    entropy: float | None
    """Nats, mean over tokens; None where passes count alone."""

    @property
    def counts(self) -> list[int]:
        """Kept copies of each expert."""
        return [int(count) for count in self.load_E]

    @property
    def wanted(self) -> list[int]:
        return [int(count) for count in self.wanted_E]

    @property
    def dropped_fraction(self) -> float:
        wanted = int(self.wanted_E.sum())
        return 1 - int(self.load_E.sum()) / wanted if wanted else 0.0


@final
class LoadCounter:
    """Adds up the reports of passes, by layer. Owned by the one who runs them."""

    def __init__(self) -> None:
        self._load: dict[int, Tensor] = {}
        self._wanted: dict[int, Tensor] = {}
        self._nats: dict[int, Tensor] = {}
        self._tokens: dict[int, Tensor] = {}

    def add(self, reports: Iterable[Report]) -> None:
        """Nothing waits for the device here."""
        for report in reports:
            _add(self._load, report.layer, report.load_E)
            _add(self._wanted, report.layer, report.wanted_E)
            if report.entropy is not None:
                _add(self._nats, report.layer, report.entropy.double() * report.tokens)
                _add(self._tokens, report.layer, report.tokens)

    @property
    def wanted(self) -> dict[int, Tensor]:
        """int64 [E] copies that the routers chose so far, by layer."""
        return dict(self._wanted)

    def result(self) -> dict[int, ExpertLoad]:
        return {layer: self._layer(layer) for layer in sorted(self._load)}

    def _layer(self, layer: int) -> ExpertLoad:
        tokens = int(self._tokens[layer]) if layer in self._tokens else 0
        entropy = float(self._nats[layer]) / tokens if tokens else None
        return ExpertLoad(self._load[layer], self._wanted[layer], entropy)


def _add(sums: dict[int, Tensor], layer: int, value: Tensor) -> None:
    sums[layer] = sums[layer] + value if layer in sums else value.clone()
