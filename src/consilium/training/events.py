"""What a run tells its listeners. Listeners are called in order, in the training process, after the fact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from consilium.config.training import Training
from consilium.evaluation.bits import Evaluation
from consilium.records.loads import FinalLoad
from consilium.training.step import StepResult


@dataclass(frozen=True, slots=True)
class Started:
    config: Training
    out: Path
    first_step: int
    """Steps already done: 0 unless resumed."""


@dataclass(frozen=True, slots=True)
class Stepped:
    step: int
    """Steps done, from 1."""
    result: StepResult
    tokens: int
    """Trained on so far."""
    tokens_per_second: float
    eta_seconds: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    step: int
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class Saved:
    step: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the user should read, such as a skipped step or a phase that takes over two seconds."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    out: Path
    checkpoint: Path
    steps: int
    tokens: int
    seconds: float
    """Spent in this process."""
    tokens_per_second: float
    """The same: 0 where the run had ended before. A summary has both of the whole run."""
    first: Evaluation | None
    """Of the untrained model; None after a resume."""
    last: Evaluation | None
    """Of the trained model; None after a stop that was asked for."""
    interrupted: bool
    final_load: Mapping[int, FinalLoad]
    """By MoE layer."""
    report: Path


Event = Started | Stepped | Evaluated | Saved | Notice | Finished
Listener = Callable[[Event], None]
