"""A training run as data: everything that decides its result, so that ``config.yaml`` repeats it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, Final, Literal, cast

from pydantic import BeforeValidator, Field, NonNegativeInt, model_validator

from consilium.config.attention import MLA
from consilium.config.balance import AdaptiveLoss, BalanceLoss, ImportanceLoss
from consilium.config.base import Size, configuration
from consilium.config.data import Data
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.optimizer import (
    WSD,
    AdamW,
    Average,
    LinearRamp,
    Muon,
    NoAverage,
    NoRamp,
    Optimizer,
    Ramp,
    Schedule,
    Spikes,
)
from consilium.config.router import NoGate, Uniform
from consilium.errors import ConsiliumError

SCHEMA_VERSION: Final = 2


@configuration
class Random:
    """Weights drawn from the seed."""

    kind: Literal["random"] = "random"


@configuration
class Train:
    """Byte-level BPE of at most the model's vocabulary, trained on the text that is not held out."""

    kind: Literal["train"] = "train"


@configuration
class Bytes:
    """256 bytes and the special tokens."""

    kind: Literal["bytes"] = "bytes"


@configuration
class Folder:
    """What a checkpoint, a run (its newest checkpoint) or a .gguf file holds."""

    kind: Literal["folder"] = "folder"
    path: str
    sha256: str | None = None
    """Of what was read there; settled when the run begins, so that other content is another run."""


StartWeights = Annotated[Random | Folder, Field(discriminator="kind")]
StartTokenizer = Annotated[Train | Bytes | Folder, Field(discriminator="kind")]


EVERY_TEN_MINUTES: Final = "10m"
_MINUTES: Final = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?m")


def _saving(value: object) -> object:
    if isinstance(value, str):
        if _MINUTES.fullmatch(value) and float(value[:-1]) > 0:
            return value
        if not value.isdecimal():
            raise ValueError(f"save_every {value!r} is neither steps such as 100 nor minutes such as 10m.")
        return int(value)
    return value


Saving = Literal["blocking", "background"]

SaveEvery = Annotated[Size | str, BeforeValidator(_saving)]


def minutes(every: str) -> float:
    """Of ``10m``."""
    return float(every.removesuffix("m"))


def _patterns(value: object) -> object:
    """A single string is one pattern, or several with commas between them."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Whether the last pattern that fits ``name`` freezes it."""
    fitting = [pattern for pattern in patterns if fnmatchcase(name, pattern.removeprefix("!"))]
    return bool(fitting) and not fitting[-1].startswith("!")


Patterns = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_patterns)]


MOST_TOKENS: Final = 2**26
"""Tokens a step: slightly more than DeepSeek-V3's 15,360 sequences of 4,096. A slip asks for all memory."""


@configuration
class Training:
    """One run. ``batch`` is global, in sequences; ``steps`` are optimizer steps."""

    schema_version: Literal[2] = SCHEMA_VERSION
    name: str | None = None
    """What the model is called, such as its recipe and size."""
    model: Model
    init: StartWeights = Random()
    """Where the weights begin; the optimizer always starts fresh."""
    tokenizer: StartTokenizer = Train()
    freeze: Patterns = ()
    """Parts that stay as they are: patterns over names of weights (``layers.*.moe.router.*``); with ``!``
    in front they train after all. The last that fits a name decides."""
    data: Data = Data()
    steps: Size
    batch: Size = 16
    accumulate: Size = 1
    """Micro-batches a step; divides ``batch``."""
    optimizer: Optimizer = AdamW()
    schedule: Schedule = WSD()
    ramp: Ramp = NoRamp()
    """How the batch begins; it stays divisible by ``accumulate``."""
    average: Average = NoAverage()
    """Weights to evaluate beside those that train: ``checkpoints/step-N/average`` is a model of its own."""
    spikes: Spikes = Spikes()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matrix products and of what a backward pass keeps. Weights, their gradients and the
    optimizer's arithmetic are float32 in both: a bfloat16 weight of 1 ignores every update below 1/256."""
    seed: Annotated[NonNegativeInt, Field(lt=2**63)] = 0
    threads: Annotated[Size, Field(le=1024)] | None = None
    save_every: SaveEvery = EVERY_TEN_MINUTES
    """Steps between checkpoints, or minutes such as ``10m``; the last step is always saved."""
    saving: Saving = "blocking"
    """``background`` copies what is saved and trains on while it is written: memory for speed."""
    keep: Size = 2
    eval_every: Size | None = None
    """Steps between validations; before the first and after the last step there is always one."""
    eval_tokens: Size = 16_384
    """Held-out tokens a domain that a validation reads at most."""
    recompute: bool = False
    """Recompute block activations in the backward pass instead of keeping them."""
    overlap: bool = False
    """Over processes: compute one half of a micro-batch's rows while those of the other half travel."""

    @model_validator(mode="before")
    @classmethod
    def _of_any_version(cls, data: Any) -> Any:
        """The first version had one text and a tokenizer beside it, and saved by steps or not at all."""
        return _second_version(cast("dict[str, Any]", data)) if isinstance(data, dict) else data

    def __post_init__(self) -> None:
        _check_gate(self.model.moe)
        if self.batch % self.accumulate:
            raise ConsiliumError(
                f"train: batch {self.batch} is not divisible into {self.accumulate} micro-batches;"
                " choose accumulate that divides batch."
            )
        _check_clip(self.optimizer, self.model)
        _check_ramp(self.ramp, self.batch, self.accumulate)
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


def _check_clip(optimizer: Optimizer, model: Model) -> None:
    if isinstance(optimizer, Muon) and optimizer.qk_clip is not None and not isinstance(model.attention, MLA):
        raise ConsiliumError(
            f"train: optimizer.qk_clip is for latent attention, and {model.family} has another; take it out."
        )


def _check_ramp(ramp: Ramp, batch: int, accumulate: int) -> None:
    if isinstance(ramp, LinearRamp) and (ramp.start > batch or ramp.start % accumulate):
        raise ConsiliumError(
            f"train: ramp.start {ramp.start} is no batch to begin with: it must not exceed batch {batch} and"
            f" be divisible into {accumulate} micro-batches; choose another."
        )


def _check_gate(moe: MoE | None) -> None:
    """A gate that trains needs a gradient: of weights that depend on it, or of a loss that reads it."""
    if moe is None or not isinstance(moe.router.weight, Uniform) or isinstance(moe.router.projection, NoGate):
        return
    if not any(map(_reaches_gate, moe.balance.losses)):
        raise ConsiliumError(
            "train: no loss reaches the gate: moe.router.weight 'uniform' gives every chosen expert weight 1"
            " and no balance loss reads the scores; choose another weight, add a loss such as --balance"
            " switch, or take the gate out (projection 'none')."
        )


def _reaches_gate(loss: BalanceLoss) -> bool:
    match loss:
        case ImportanceLoss():  # of the weights, which do not depend on the gate here
            return False
        case AdaptiveLoss(most=most):
            return most > 0
        case _:
            return loss.coefficient > 0


def _second_version(data: dict[str, Any]) -> dict[str, Any]:
    if data.get("schema_version") != 1 or not isinstance(data.get("data", {}), dict):
        return data
    text = dict(cast("dict[str, Any]", data.get("data", {})))
    kind, source = text.pop("tokenizer", "bpe"), text.pop("source", None)
    return data | {
        "schema_version": SCHEMA_VERSION,
        "data": text if source is None else text | {"sources": [source]},
        "tokenizer": {"kind": "train" if kind == "bpe" else kind},
        "save_every": data.get("save_every") or EVERY_TEN_MINUTES,
    }
