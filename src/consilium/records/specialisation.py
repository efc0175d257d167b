"""Which experts prefer which label: counts of expert x label and their mutual information, per MoE layer.

``routing/specialisation.json`` holds a Specialisation. Legend: E experts, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from consilium.errors import ConsiliumError
from consilium.records.io import STRICT

SPECIALISATION_FILE = "routing/specialisation.json"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Association:
    """How much one labelling of the tokens says about the choice of expert."""

    counts_EL: tuple[tuple[NonNegativeInt, ...], ...]
    """Kept copies of tokens with label l at expert e."""
    bits: float
    """Mutual information of expert and label, plug-in estimate. Never zero on a finite sample."""
    shuffled_bits: float
    """The same with labels shuffled over tokens, mean of ``shuffles``: what chance alone gives."""
    shuffles: PositiveInt

    @property
    def corrected_bits(self) -> float:
        """Mutual information above chance; near zero, of either sign, where there is none."""
        return self.bits - self.shuffled_bits

    @property
    def normalised(self) -> float:
        """Corrected bits over the entropy of the expert choice: the share of it that the label explains."""
        entropy = entropy_bits([sum(row) for row in self.counts_EL])
        return self.corrected_bits / entropy if entropy > 0 else 0.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LayerSpecialisation:
    layer: NonNegativeInt
    """Block index."""
    domain: Association
    syntax: Association


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Specialisation:
    schema_version: Literal[1] = 1
    domains: tuple[str, ...]
    syntaxes: tuple[str, ...]
    tokens: NonNegativeInt
    """With a domain."""
    layers: tuple[LayerSpecialisation, ...]

    def __post_init__(self) -> None:
        for layer in self.layers:
            for labels, association in ((self.domains, layer.domain), (self.syntaxes, layer.syntax)):
                if any(len(row) != len(labels) for row in association.counts_EL):
                    raise ConsiliumError(f"layer {layer.layer} has counts that do not fit its labels")


def entropy_bits(counts: Sequence[float]) -> float:
    """Entropy in bits of the distribution that ``counts`` is proportional to; 0 where all are zero."""
    total = sum(counts)
    return -sum(c / total * math.log2(c / total) for c in counts if c > 0) if total else 0.0
