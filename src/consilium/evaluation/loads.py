"""How many tokens each expert got over several passes: evaluation and generation record it as training does.

Legend: E routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from consilium.moe.types import Report


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """One layer's routing, summed over passes."""

    load: tuple[int, ...]
    """Kept copies of each expert."""
    wanted: tuple[int, ...]
    """Copies that the router chose before admission."""
    entropy: float | None
    """Nats, mean over tokens; None where passes count alone."""

    @property
    def dropped_fraction(self) -> float:
        wanted = sum(self.wanted)
        return 1 - sum(self.load) / wanted if wanted else 0.0


@final
class LoadCounter:
    """Adds up the reports of passes, by layer. Owned by the one who runs them."""

    def __init__(self) -> None:
        self._load: dict[int, Tensor] = {}
        self._wanted: dict[int, Tensor] = {}
        self._nats: dict[int, Tensor] = {}
        self._tokens: dict[int, Tensor] = {}

    def add(self, reports: Mapping[int, Report]) -> None:
        """Nothing waits for the device here."""
        for layer, report in reports.items():
            _add(self._load, layer, report.load_E)
            _add(self._wanted, layer, report.wanted_E)
            if report.entropy is not None and report.tokens is not None:
                _add(self._nats, layer, report.entropy.double() * report.tokens)
                _add(self._tokens, layer, report.tokens)

    def result(self) -> dict[int, ExpertLoad]:
        return {layer: self._layer(layer) for layer in sorted(self._load)}

    def _layer(self, layer: int) -> ExpertLoad:
        tokens = int(self._tokens[layer]) if layer in self._tokens else 0
        return ExpertLoad(
            load=tuple(map(int, self._load[layer].tolist())),
            wanted=tuple(map(int, self._wanted[layer].tolist())),
            entropy=float(self._nats[layer]) / tokens if tokens else None,
        )


def _add(sums: dict[int, Tensor], layer: int, value: Tensor) -> None:
    sums[layer] = sums[layer] + value if layer in sums else value.clone()
