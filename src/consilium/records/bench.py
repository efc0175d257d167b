"""One benchmark: what was run where, and the figures it gave. Documents take their numbers from these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Literal

from pydantic import AwareDatetime, PositiveInt
from pydantic.dataclasses import dataclass

from consilium.errors import ConsiliumError
from consilium.records.io import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Figure:
    """``n`` measurements of one thing, and optionally how a rival did in the same run."""

    name: str
    unit: str
    """Of the three numbers, such as ``tokens/s``, ``ms`` or ``GB/s``."""
    median: float
    minimum: float
    maximum: float
    n: PositiveInt
    against: str | None = None
    """What ``ratio`` compares with, such as ``transformers 5.23 grouped_mm, bf16 autocast``."""
    ratio: float | None = None
    """This median over the rival's median."""

    def __post_init__(self) -> None:
        if not self.minimum <= self.median <= self.maximum:
            raise ConsiliumError(
                f"{self.name}: median {self.median} lies outside {self.minimum} to {self.maximum}"
            )
        if (self.against is None) != (self.ratio is None):
            raise ConsiliumError(f"{self.name}: give both 'against' and 'ratio' or neither")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BenchRecord:
    schema_version: Literal[1] = 1
    name: str
    machine: str
    """CPU model, cores, memory; accelerator if used."""
    commit: str
    command: str
    """What repeats it."""
    date: AwareDatetime
    figures: tuple[Figure, ...]
    sources: Mapping[str, str] = field(default_factory=dict[str, str])
    """SHA-256 of the weights that runs began with or stand beside, by seed: of equal ones runs are paired."""
