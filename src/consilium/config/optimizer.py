"""Optimizers, learning-rate schedules and what watches a step, as data."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from consilium.config.base import Size, configuration

Fraction = Annotated[float, Field(ge=0, lt=1)]


@configuration
class Constant:
    """Linear warm-up, then the peak to the end."""

    kind: Literal["constant"] = "constant"
    warmup: Fraction = 0.05


@configuration
class Cosine:
    """Linear warm-up, then half a cosine from the peak to ``final`` times the peak."""

    kind: Literal["cosine"] = "cosine"
    warmup: Fraction = 0.05
    final: NonNegativeFloat = 0.1


@configuration
class WSD:
    """Warm-up, stable, decay: the last ``decay`` of the steps falls linearly to ``final`` times the peak."""

    kind: Literal["wsd"] = "wsd"
    warmup: Fraction = 0.05
    decay: Annotated[float, Field(gt=0, le=1)] = 0.6
    final: NonNegativeFloat = 0.05


@configuration
class StepDecay:
    """Warm-up, then times ``factor`` at each fraction of the run (DeepSeekMoE: 0.316 at 0.8 and 0.9)."""

    kind: Literal["steps"] = "steps"
    warmup: Fraction = 0.05
    at: tuple[float, ...] = (0.8, 0.9)
    factor: PositiveFloat = 0.316


Schedule = Annotated[Constant | Cosine | WSD | StepDecay, Field(discriminator="kind")]


@configuration
class Float32State:
    """Both moments in float32."""

    kind: Literal["float32"] = "float32"


@configuration
class BlockState:
    """Both moments of hidden matrices in 8 bits (2110.02861): a code a value, a scale a block.

    Embedding, head, router, norms and biases keep float32 moments, as do matrices below ``smallest`` values.
    """

    kind: Literal["int8"] = "int8"
    block: Size = 256
    """Values that share a scale."""
    smallest: NonNegativeInt = 4096


State = Annotated[Float32State | BlockState, Field(discriminator="kind")]


@configuration
class AdamW:
    """AdamW (1711.05101). Weight decay is decoupled and of matrices only: norms and biases never decay."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: PositiveFloat = 3e-3
    router_learning_rate: PositiveFloat | None = None
    """Peak of the routers' weights; None: that of all."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: PositiveFloat = 1e-8
    decay: NonNegativeFloat = 0.1
    clip: PositiveFloat = 1.0
    """Largest global gradient norm."""
    state: State = Float32State()


@configuration
class Muon:
    """Muon for hidden matrices, each expert's its own; AdamW for embedding, head, router, norms and biases.

    An update is the momentum with its singular values near 1, by Newton-Schulz with the coefficients of
    Jordan 2024 (kellerjordan.github.io/posts/muon), times 0.2 sqrt(larger side): the size of an AdamW update,
    so that both share one rate and one decoupled decay (Moonlight, 2502.16982 section 2.2).
    """

    kind: Literal["muon"] = "muon"
    learning_rate: PositiveFloat = 3e-3
    router_learning_rate: PositiveFloat | None = None
    """Peak of the routers' weights; None: that of all."""
    momentum: Fraction = 0.95
    nesterov: bool = True
    """Orthogonalise the momentum as it will be after this gradient counts once more."""
    iterations: Annotated[Size, Field(le=20)] = 5
    """Of Newton-Schulz."""
    products: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the Newton-Schulz products. bfloat16 is what the published runs on accelerators use."""
    rms: PositiveFloat = 0.2
    """Root mean square of an update before the learning rate."""
    qk_clip: PositiveFloat | None = None
    """Largest logit of a head of latent attention (Kimi K2, 2507.20534: 100): after a step in which one was
    larger its queries and keys shrink so that it would not have been."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: PositiveFloat = 1e-8
    decay: NonNegativeFloat = 0.1
    clip: PositiveFloat = 1.0
    """Largest global gradient norm."""


@configuration
class Spikes:
    """What a loss or gradient norm far above those of the steps before it does.

    Far is more than ``deviations`` times the spread above the median of the newest ``window`` ordinary steps;
    the spread is 1.4826 times the median distance from the median, a standard deviation where values are
    normal, and at least 2 % of the median. Neither is moved by a few outliers.
    """

    action: Literal["tell", "skip"] = "tell"
    """``skip`` leaves weights, moments and balance as they were, until a level that stays is accepted."""
    window: Annotated[Size, Field(ge=16, le=10_000)] = 128
    deviations: PositiveFloat = 6.0


@configuration
class NoAverage:
    """The weights that train are all there is."""

    kind: Literal["none"] = "none"


@configuration
class Exponential:
    """An average beside the weights: a += (1 - decay) (w - a) after each step, the mean of all at first."""

    kind: Literal["exponential"] = "exponential"
    decay: Fraction = 0.999


Average = Annotated[NoAverage | Exponential, Field(discriminator="kind")]


@configuration
class NoRamp:
    """The batch is as large from the first step on."""

    kind: Literal["none"] = "none"


@configuration
class LinearRamp:
    """From ``start`` sequences to the whole batch over the first ``share`` of the steps.

    DeepSeek-V3 (2412.19437 section 4.2) goes from 3072 to 15360 in 469 of 14,800 billion tokens.
    """

    kind: Literal["linear"] = "linear"
    start: Size
    share: Annotated[float, Field(gt=0, le=1)] = 0.03


Ramp = Annotated[NoRamp | LinearRamp, Field(discriminator="kind")]


def _with_kind(value: object) -> object:
    """Before there was a choice, the keys of AdamW stood alone."""
    return {"kind": "adamw", **cast("dict[str, Any]", value)} if isinstance(value, dict) else value


Optimizer = Annotated[AdamW | Muon, Field(discriminator="kind"), BeforeValidator(_with_kind)]
