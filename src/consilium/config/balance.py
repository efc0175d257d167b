"""Balance as data: auxiliary losses that are added up, and the rule that moves the selection bias.

A loss multiplies counts, which carry no gradient, by mean probabilities, which do. Its scope says where both
are taken: a "batch" is a micro-batch of one rank, and a "sequence" what ``Balance.sequence`` says. "global"
takes the counts of all ranks and of the micro-batches so far (2501.11873 section 3, whose buffer fills while
gradients accumulate); "step" those of the whole step, which passes without gradient count first, so that the
loss is the same however a step is cut. Probabilities of both stay those of the micro-batch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from consilium.config.base import Size, configuration
from consilium.errors import ConsiliumError

Scope = Literal["batch", "sequence", "global", "step"]


@configuration
class SwitchLoss:
    """coefficient * E/k * sum f_i P_i over the micro-batch: equals the coefficient at perfect balance.

    Switch (2101.03961 eq. 4) at k = 1 and DeepSeekMoE's expert-level loss (2401.06066 eq. 12) at any k.
    ``counts="first"`` counts first choices only (GShard); GShard's own value is this one over E^2.
    """

    kind: Literal["switch"] = "switch"
    coefficient: NonNegativeFloat = 1e-2
    counts: Literal["all", "first"] = "all"
    scope: Literal["batch", "global", "step"] = "batch"

    def __post_init__(self) -> None:
        if self.scope != "batch" and self.counts == "first":
            raise ConsiliumError(
                f"moe.balance: a switch loss of scope {self.scope!r} reads the loads of the step, which count"
                " every choice; set counts to 'all' or scope to 'batch'."
            )


@configuration
class SequenceLoss:
    """The same product in each sequence, averaged over sequences (DeepSeek-V2 eq. 23, V3 eq. 17).

    ``Balance.sequence`` says what a sequence is.
    """

    kind: Literal["sequence"] = "sequence"
    coefficient: NonNegativeFloat = 1e-4
    counts: Literal["routed", "scores"] = "routed"


@configuration
class DeviceLoss:
    """Mean f times summed P of each device's experts (DeepSeekMoE eq. 15, DeepSeek-V2 eq. 26)."""

    kind: Literal["device"] = "device"
    coefficient: NonNegativeFloat = 0.05
    devices: Size
    scope: Scope = "batch"


@configuration
class CommunicationLoss:
    """Tokens sent to each device, at most ``most`` a token, times its summed P (DeepSeek-V2 eq. 29)."""

    kind: Literal["communication"] = "communication"
    coefficient: NonNegativeFloat = 0.02
    devices: Size
    most: Size
    scope: Scope = "sequence"

    def __post_init__(self) -> None:
        if self.most > self.devices:
            raise ConsiliumError(
                f"moe.balance: a communication loss of at most {self.most} devices a token has only"
                f" {self.devices} devices; lower most."
            )


@configuration
class ImportanceLoss:
    """Squared coefficient of variation of summed weights (Shazeer 2017 eq. 7)."""

    kind: Literal["importance"] = "importance"
    coefficient: NonNegativeFloat = 0.1


@configuration
class LoadLoss:
    """Squared coefficient of variation of the smooth load estimate (Shazeer 2017 eq. 11).

    Needs learned noise and a plain choice of the highest noisy logits, whose chance it estimates.
    """

    kind: Literal["load"] = "load"
    coefficient: NonNegativeFloat = 0.1


@configuration
class ZLoss:
    """Mean squared logsumexp of the clean logits (ST-MoE, 2202.08906 eq. 5)."""

    kind: Literal["z"] = "z"
    coefficient: NonNegativeFloat = 1e-3


@configuration
class AdaptiveLoss:
    """Skywork's sum (1/n - mean g)^2 (2406.06563 eq. 4-6), whose coefficient follows the layer's drop rate.

    Needs a capacity: without drops the coefficient decays to zero.
    """

    kind: Literal["adaptive"] = "adaptive"
    start: NonNegativeFloat = 1e-2
    most: PositiveFloat = 1e-2
    slope: PositiveFloat = 0.2
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99


BalanceLoss = Annotated[
    SwitchLoss
    | SequenceLoss
    | DeviceLoss
    | CommunicationLoss
    | ImportanceLoss
    | LoadLoss
    | ZLoss
    | AdaptiveLoss,
    Field(discriminator="kind"),
]


@configuration
class NoBias:
    kind: Literal["none"] = "none"


@configuration
class SignBias:
    """b += rate * sign(mean load - load) after each optimizer step (DeepSeek-V3 2.1.2, 2408.15664).

    ``centred`` takes the mean out of the step, as Trinity's smaller models do (2602.17004): biases no longer
    drift together, and no choice changes.
    """

    kind: Literal["sign"] = "sign"
    rate: NonNegativeFloat = 1e-3
    centred: bool = False


@configuration
class LinearBias:
    """b += rate * (mean load - load) / mean load after each optimizer step: a rule of this project.

    The variant "b += u e" of 2408.15664 has the excess e in tokens, so that its rate depends on the batch.
    """

    kind: Literal["linear"] = "linear"
    rate: NonNegativeFloat = 1e-2


@configuration
class SMEBU:
    """Soft-clamped momentum expert bias updates (Trinity Large, 2602.17004).

    v = tanh(steepness * (mean load - load) / mean load), less its mean over experts; m = momentum * m +
    (1 - momentum) * rate * v; b += m. Trinity Large has steepness 2 and momentum 0.5.
    """

    kind: Literal["smebu"] = "smebu"
    rate: NonNegativeFloat = 5e-4
    steepness: PositiveFloat = 2.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5


@configuration
class PIDBias:
    """b = proportional * e + integral * (sum of all e so far) + derivative * (e - the e before).

    e = 1/E - an expert's share of the choices. The integral alone is the rule that LongCat-Flash prints for
    its real experts (2509.01322 section 2.1: b += mu (K_e / K / N - T_i / (K T))), which it calls a PID
    controller; the two other gains are of this project. Like LongCat's mu, gains are per share: E times
    those of a rule that divides by the mean load.
    """

    kind: Literal["pid"] = "pid"
    proportional: NonNegativeFloat = 0.1
    integral: NonNegativeFloat = 0.2
    derivative: NonNegativeFloat = 0.05


@configuration
class QuantileBias:
    """b -= (1 - momentum) * c: c would give every expert its exact share of this step (Su 2026; Kimi K3).

    A token's margin at an expert is its selection value there less its (k + 1)-th highest: it chooses where
    that is above zero. With T k / E tokens for each of E experts, c is the next highest margin. Nothing is to
    be tuned: b has the scale of the scores. ``statistics="exact"`` keeps the margins of a step, T E numbers
    a layer, and asks ranks for 32 sums of counts; "histogram" counts them in 16 bins an octave, in memory
    that does not grow with the step, and asks for one.
    """

    kind: Literal["quantile"] = "quantile"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    statistics: Literal["exact", "histogram"] = "exact"


BiasRule = Annotated[
    NoBias | SignBias | LinearBias | SMEBU | PIDBias | QuantileBias, Field(discriminator="kind")
]


@configuration
class Balance:
    """``sequence`` says what a sequence is to the losses that average over sequences.

    A "document", however many of them are packed into a row, which attention keeps apart; or a "row", as
    trainers mean it that pack without keeping documents apart (DeepSeek-V3, 2412.19437 section 4.1).
    """

    losses: tuple[BalanceLoss, ...] = ()
    bias: BiasRule = NoBias()
    bias_until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the run in which the bias moves; then it stays (DeepSeek-V3: 14.3 of 14.8 trillion tokens)."""
    sequence: Literal["document", "row"] = "document"

    def __post_init__(self) -> None:
        if sum(isinstance(loss, AdaptiveLoss) for loss in self.losses) > 1:
            raise ConsiliumError(
                "moe.balance.losses has two adaptive losses but a layer has one coefficient; keep one."
            )
        if len(self._partitions) > 1:
            raise ConsiliumError(
                "moe.balance.losses has communication losses over the step for several numbers of devices,"
                f" {sorted(self._partitions)}, but a layer counts for one; give them one number."
            )

    @property
    def _partitions(self) -> set[int]:
        wide = ("global", "step")
        return {
            loss.devices for loss in self.losses if isinstance(loss, CommunicationLoss) and loss.scope in wide
        }

    @property
    def counted_devices(self) -> int | None:
        """Devices whose tokens are counted over the step, None where no loss asks."""
        return next(iter(self._partitions), None)

    @property
    def counts_ahead(self) -> bool:
        """Whether the choices of a whole step must be known before its first gradient."""
        scoped = (
            loss for loss in self.losses if isinstance(loss, SwitchLoss | DeviceLoss | CommunicationLoss)
        )
        return any(loss.scope == "step" for loss in scoped)
