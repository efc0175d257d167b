"""A training run as data: everything that decides its result, so that ``config.yaml`` repeats it."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from consilium.config.base import Size, configuration
from consilium.config.model import Model
from consilium.errors import ConsiliumError

SCHEMA_VERSION = 1


@configuration
class Cosine:
    """Linear warm-up, then half a cosine from the peak to ``final`` times the peak."""

    kind: Literal["cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    final: NonNegativeFloat = 0.1


@configuration
class WSD:
    """Warm-up, stable, decay: the last ``decay`` of the steps falls linearly to ``final`` times the peak."""

    kind: Literal["wsd"] = "wsd"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    decay: Annotated[float, Field(gt=0, le=1)] = 0.6
    final: NonNegativeFloat = 0.05


@configuration
class Steps:
    """Warm-up, then times ``factor`` at each fraction of the run (DeepSeekMoE: 0.316 at 0.8 and 0.9)."""

    kind: Literal["steps"] = "steps"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    at: tuple[float, ...] = (0.8, 0.9)
    factor: PositiveFloat = 0.316


Schedule = Annotated[Cosine | WSD | Steps, Field(discriminator="kind")]


@configuration
class AdamW:
    """Decoupled weight decay on matrices only; norms, biases and the selection bias never decay."""

    learning_rate: PositiveFloat = 3e-3
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    epsilon: PositiveFloat = 1e-8
    decay: NonNegativeFloat = 0.1
    clip: PositiveFloat = 1.0
    """Largest global gradient norm."""


@configuration
class BuiltIn:
    """Text that every Python ships (code, prose, docstrings), generated mathematics and bilingual text."""

    kind: Literal["builtin"] = "builtin"


@configuration
class Path:
    """The user's own .txt, .md, .py, .jsonl (key ``text``) file or a folder of them."""

    kind: Literal["path"] = "path"
    path: str


Source = Annotated[BuiltIn | Path, Field(discriminator="kind")]


@configuration
class Data:
    source: Source = BuiltIn()
    sequence_length: Size = 128
    """Tokens a packed sequence."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of files held out for validation."""
    tokenizer: Literal["bpe", "bytes"] = "bpe"
    temperature: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Domains are sampled in proportion to size ** temperature; 1 is by size, 0 is uniform."""


MOST_TOKENS: Final = 2**26
"""Tokens a step: slightly more than DeepSeek-V3's 15,360 sequences of 4,096. A slip asks for all memory."""


@configuration
class Training:
    """One run. ``batch`` is global, in sequences; ``steps`` are optimizer steps."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str | None = None
    """What the model is called, such as its recipe and size."""
    model: Model
    data: Data = Data()
    steps: Size
    batch: Size = 16
    accumulate: Size = 1
    """Micro-batches a step; divides ``batch``."""
    optimizer: AdamW = AdamW()
    schedule: Schedule = WSD()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matrix products; master weights are float32 in both."""
    seed: Annotated[NonNegativeInt, Field(lt=2**63)] = 0
    threads: Annotated[Size, Field(le=1024)] | None = None
    save_every: Size | None = None
    """Steps between checkpoints; the last step is always saved."""
    keep: Size = 2
    eval_every: Size | None = None
    """Steps between validations; before the first and after the last step there is always one."""
    eval_tokens: Size = 16_384
    """Held-out tokens a domain that a validation reads at most."""
    recompute: bool = False
    """Recompute block activations in the backward pass instead of keeping them."""

    def __post_init__(self) -> None:
        if self.batch % self.accumulate:
            raise ConsiliumError(
                f"train: batch {self.batch} is not divisible into {self.accumulate} micro-batches;"
                " choose accumulate that divides batch."
            )
        if self.batch * self.data.sequence_length > MOST_TOKENS:
            raise ConsiliumError(
                f"train: {self.batch} sequences of {self.data.sequence_length} tokens are more than the"
                f" {MOST_TOKENS:,} tokens that a step may have; lower --batch or --seq."
            )
        if self.data.sequence_length > self.model.max_length:
            raise ConsiliumError(
                f"train: sequences of {self.data.sequence_length} tokens exceed model.max_length"
                f" {self.model.max_length}; lower --seq or raise the model's length."
            )
