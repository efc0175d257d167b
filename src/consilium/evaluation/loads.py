"""How many tokens each expert got over several passes: training, evaluation and generation count alike.

Legend: E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar, final

from torch import Tensor

from consilium.moe.types import Counted, Margins, Reduce, Report, alone


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLoad:
    """One layer's routing, summed over passes."""

    load_E: Tensor
    """int64 kept copies of each expert."""
    wanted_E: Tensor
    """int64 copies that the router chose before admission."""
    entropy: float | None
    """Nats, mean over tokens; None where passes count alone."""
    margins: Margins | None = None
    """Of a step of training, where they move the bias."""

    def __eq__(self, other: object) -> bool:
        """Tensors have no truth of their own."""
        return isinstance(other, ExpertLoad) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def _values(self) -> tuple[tuple[int, ...], tuple[int, ...], float | None]:
        return tuple(self.counts), tuple(self.wanted), self.entropy

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
        self._counted: dict[int, Counted] = {}
        self._nats: dict[int, Tensor] = {}
        self._tokens: dict[int, Tensor] = {}
        self._margins: dict[int, Margins] = {}

    def add(self, reports: Iterable[Report]) -> None:
        """Nothing waits for the device here."""
        for report in reports:
            _add(self._load, report.layer, report.load_E)
            _add(self._counted, report.layer, report.counted)
            if report.entropy is not None:
                _add(self._nats, report.layer, report.entropy.double() * report.tokens)
                _add(self._tokens, report.layer, report.tokens)
            if report.margins is not None:
                _add(self._margins, report.layer, report.margins)

    @property
    def counted(self) -> dict[int, Counted]:
        """What the routers chose so far, by layer."""
        return dict(self._counted)

    def result(self, reduce: Reduce = alone) -> dict[int, ExpertLoad]:
        """By layer, over all ranks; margins are of this one."""
        return {layer: self._layer(layer, reduce) for layer in sorted(self._load)}

    def _layer(self, layer: int, reduce: Reduce) -> ExpertLoad:
        counted, load_E = self._counted[layer].over(reduce), reduce(self._load[layer])
        tokens = int(reduce(self._tokens[layer])) if layer in self._tokens else 0
        entropy = float(reduce(self._nats[layer])) / tokens if tokens else None
        return ExpertLoad(load_E, counted.wanted_E, entropy, self._margins.get(layer))


class _Added(Protocol):
    def __add__(self, other: Self) -> Self: ...


V = TypeVar("V", bound=_Added)


def _add(sums: dict[int, V], layer: int, value: V) -> None:
    sums[layer] = sums[layer] + value if layer in sums else value
