"""What a training run says about itself: where it ran, how each logged step went, and how it ended.

``meta.json`` holds a RunMeta, ``summary.json`` a Summary; ``metrics.jsonl`` one StepRecord a line,
whose keys are in ``records.metrics``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from consilium.disk import atomic
from consilium.errors import ConsiliumError
from consilium.records.io import STRICT, Measured

CONFIG_FILE = "config.yaml"
"""What the run was started with, complete: training it anew gives the same run."""
META_FILE = "meta.json"
SUMMARY_FILE = "summary.json"
CHECKPOINTS = "checkpoints"
"""The folder of a run that holds its ``step-N``."""
AVERAGE = "average"
"""The folder of a checkpoint that holds the averaged model, where a run averages."""


def checkpoint_at(run: Path, step: int) -> Path:
    """Where a run keeps what it had reached after ``step``."""
    return run / CHECKPOINTS / f"step-{step}"


def newest_of_run(
    folder: Path | str, own: str, *, notice: atomic.Notice = logging.getLogger("consilium").warning
) -> Path:
    """Return the newest complete checkpoint of a run, and any other folder, or one with ``own``, as it is.

    One that is incomplete is passed over and told to ``notice``. Nothing is written, and no weights are read.
    Raises ConsiliumError for a run that has none.
    """
    folder = atomic.standing(Path(folder))
    if (folder / own).exists() or not (folder / CHECKPOINTS).is_dir():
        return folder
    newest = atomic.latest(folder / CHECKPOINTS, notice=notice)
    if newest is None:
        raise ConsiliumError(
            f"{folder} has no complete checkpoint yet; continue it with consilium train ... --resume."
        )
    return newest


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Versions:
    consilium: str
    torch: str
    python: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Hardware:
    cpu: str
    threads: PositiveInt
    memory_bytes: NonNegativeInt
    accelerator: str | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Change:
    """A setting that a resume changed; ``config.yaml`` has the newest."""

    step: NonNegativeInt
    """Steps done before."""
    key: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunMeta:
    """Everything that identifies a run beside its configuration."""

    schema_version: Literal[1] = 1
    model: str
    """Recipe and size, such as ``deepseek-v3:tiny``; the family where it has no name."""
    parameters_total: PositiveInt
    parameters_active: PositiveInt
    """Parameters a token passes through."""
    corpus: str
    """Name of the text: ``builtin`` or a path as the user gave it."""
    corpus_sha256: str
    seed: NonNegativeInt
    started: AwareDatetime
    versions: Versions
    hardware: Hardware
    calibration_tokens_per_second: NonNegativeFloat | None = None
    """Speed that turned ``--minutes`` into steps."""
    changes: tuple[Change, ...] = ()
    """In the order in which they were asked for."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StepRecord:
    """One logged step. Absent numbers are None; numbers that were not finite are NaN, null in the file."""

    step: NonNegativeInt
    tokens: NonNegativeInt
    """Trained on so far."""
    loss: float | None = None
    """Everything that was minimised, in nats a token."""
    ce: float | None = None
    """Next-token cross-entropy alone, in nats a token."""
    grad_norm: float | None = None
    lr: float | None = None
    tok_per_sec: float | None = None
    skipped: float | None = None
    """1 where the weights stayed: a loss or gradient was not finite or a spike, or no token was learned."""
    spike: float | None = None
    """1 where the loss or the gradient norm was far above those of the steps before."""
    bits_per_byte: float | None = None
    """Held out, mean over domains."""
    max_over_mean: float | None = None
    """Load of the busiest expert over its fair share, the worst layer."""
    dead_experts: float | None = None
    router_entropy: float | None = None
    """Mean over tokens and layers, in nats."""
    dropped_frac: float | None = None
    bias_spread: float | None = None
    """Highest less lowest selection bias of a layer, the worst layer."""
    domains: Mapping[str, float] = Field(default_factory=dict[str, float])
    """Held-out bits per byte by domain."""
    layers: Mapping[int, float] = Field(default_factory=dict[int, float])
    """max_over_mean by block index."""
    losses: Mapping[str, float] = Field(default_factory=dict[str, float])
    """Balance losses by name, coefficients included."""
    shares: Mapping[str, float] = Field(default_factory=dict[str, float])
    """Share of the rows of each domain from this step on, where it changes."""
    other: Mapping[str, float] = Field(default_factory=dict[str, float])
    """Numbers under keys that this version does not know; kept, so that nothing is lost."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BitsPerByte:
    """Held-out bits per byte of each domain."""

    domains: Annotated[Mapping[str, Measured], Field(min_length=1)]

    @property
    def macro(self) -> float:
        """Mean over domains, so that an easy or a large domain cannot carry it."""
        return sum(self.domains.values()) / len(self.domains)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Dense:
    """A dense model of the same active parameters, trained on the same tokens."""

    bits_per_byte: BitsPerByte
    parameters: PositiveInt
    tokens_per_second: NonNegativeFloat


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sample:
    prompt: str
    text: str
    """The continuation, without the prompt."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Summary:
    """How a run ended. Every number is on held-out text."""

    schema_version: Literal[1] = 1
    steps: NonNegativeInt
    tokens: NonNegativeInt
    seconds: NonNegativeFloat
    """Wall-clock of training, validation excluded."""
    tokens_per_second: NonNegativeFloat
    trained: BitsPerByte
    untrained: BitsPerByte | None = None
    trigram: BitsPerByte | None = None
    """Byte trigram model of the same training text."""
    xz: BitsPerByte | None = None
    """``xz -9`` on the held-out text alone."""
    dense: Dense | None = None
    sample: Sample | None = None
