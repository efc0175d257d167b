"""What we promise, and the tests that would show it false."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass

from consilium.records.io import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Promise:
    record: str
    """Name of the bench record of its large-count run, with the figures ``trials`` and ``failures``."""
    sentence: str
    tests: tuple[str, ...] = Field(min_length=1)
    """Folders and files, from the root of the repository."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Promises:
    promises: tuple[Promise, ...]
