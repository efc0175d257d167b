"""Balance as data: auxiliary losses that are added up, and the rule that moves the selection bias."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from consilium.config.base import Size, configuration
from consilium.errors import ConsiliumError


@configuration
class SwitchLoss:
    """coefficient * E/k * sum f_i P_i over the micro-batch: equals the coefficient at perfect balance.

    Switch (2101.03961 eq. 4) at k = 1 and DeepSeekMoE's expert-level loss (2401.06066 eq. 12) at any k.
    ``counts="first"`` counts first choices only (GShard); GShard's own value is this one over E^2.
    ``scope="global"`` takes f from the whole step, every micro-batch so far and every rank (2501.11873);
    P stays that of the micro-batch.
    """

    kind: Literal["switch"] = "switch"
    coefficient: NonNegativeFloat = 1e-2
    counts: Literal["all", "first"] = "all"
    scope: Literal["batch", "global"] = "batch"

    def __post_init__(self) -> None:
        if self.scope == "global" and self.counts == "first":
            raise ConsiliumError(
                "moe.balance: a switch loss of scope 'global' reads the loads of the step, which count every"
                " choice; set counts to 'all' or scope to 'batch'."
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
    scope: Literal["batch", "sequence"] = "batch"


@configuration
class CommunicationLoss:
    """Tokens sent to each device, at most ``most`` a token, times its summed P (DeepSeek-V2 eq. 29)."""

    kind: Literal["communication"] = "communication"
    coefficient: NonNegativeFloat = 0.02
    devices: Size
    most: Size
    scope: Literal["batch", "sequence"] = "sequence"

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
    """b += rate * sign(mean load - load) after each optimizer step (DeepSeek-V3 2.1.2, 2408.15664)."""

    kind: Literal["sign"] = "sign"
    rate: NonNegativeFloat = 1e-3


@configuration
class LinearBias:
    """b += rate * (mean load - load) / mean load after each optimizer step: a rule of this project.

    The variant "b += u e" of 2408.15664 has the excess e in tokens, so that its rate depends on the batch.
    """

    kind: Literal["linear"] = "linear"
    rate: NonNegativeFloat = 1e-2


BiasRule = Annotated[NoBias | SignBias | LinearBias, Field(discriminator="kind")]


@configuration
class Balance:
    """``sequence`` says what a sequence is to the losses that average over sequences.

    A "document", however many of them are packed into a row, which attention keeps apart; or a "row", as
    trainers mean it that pack without keeping documents apart (DeepSeek-V3, 2412.19437 section 4.1).
    """

    losses: tuple[BalanceLoss, ...] = ()
    bias: BiasRule = NoBias()
    sequence: Literal["document", "row"] = "document"

    def __post_init__(self) -> None:
        if sum(isinstance(loss, AdaptiveLoss) for loss in self.losses) > 1:
            raise ConsiliumError(
                "moe.balance.losses has two adaptive losses but a layer has one coefficient; keep one."
            )
