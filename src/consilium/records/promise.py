"""What we promise, and the tests that would show it false."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from consilium.records.io import STRICT

Breakage = Literal[
    "SIGKILL",
    "SIGTERM",
    "SIGINT",
    "SIGHUP",
    "SIGSTOP",
    "power cut (simulated)",
    "disk full",
    "error in a step",
    "damaged file",
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Promise:
    record: str
    """Name of the bench record of its large-count run, with the figures ``trials`` and ``failures``."""
    sentence: str
    tests: tuple[str, ...] = Field(min_length=1)
    """Folders and files, from the root of the repository."""
    broken: tuple[Breakage, ...] = ()
    """What the tests do to the process, the machine or the disk while something is written or runs."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Promises:
    promises: tuple[Promise, ...]
