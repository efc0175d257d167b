"""The MoE layer as data: router, admission, balance and shared experts, and what must hold between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from consilium.config.balance import (
    AdaptiveLoss,
    Balance,
    CommunicationLoss,
    DeviceLoss,
    LoadLoss,
    NoBias,
    QuantileBias,
    ZLoss,
)
from consilium.config.base import Size, configuration
from consilium.config.feed_forward import Activation, matrices
from consilium.config.router import (
    ExpertChoice,
    Groups,
    LearnedNoise,
    NoGate,
    NoNoise,
    Router,
    SampledSecond,
    Sinkhorn,
    TopK,
    TwoLevel,
)
from consilium.errors import ConsiliumError


@configuration
class Dropless:
    kind: Literal["dropless"] = "dropless"


@configuration
class Capacity:
    """At most ceil(factor * T * k / E) copies an expert, T the valid tokens of the micro-batch.

    ``by="position"`` keeps the first tokens, first choices before second (GShard, Switch);
    ``by="probability"`` keeps the highest scores. ``scope`` says when the limit holds. With ``group_tokens``
    it holds in each run of that many valid tokens, T being the tokens of the run (GShard's local groups).
    """

    kind: Literal["capacity"] = "capacity"
    factor: PositiveFloat
    by: Literal["position", "probability"] = "position"
    scope: Literal["training", "always"] = "training"
    group_tokens: Size | None = None


@configuration
class DeviceCapacity:
    """Each of ``devices`` equal groups takes at most ceil(factor * average); the lowest scores drop.

    In training only; a fraction ``exempt`` of sequences never drops (DeepSeek-V2, 2405.04434 section 2.2.4).
    """

    kind: Literal["device_capacity"] = "device_capacity"
    devices: Size
    factor: PositiveFloat = 1.0
    exempt: Annotated[float, Field(ge=0, le=1)] = 0.1


Admission = Annotated[Dropless | Capacity | DeviceCapacity, Field(discriminator="kind")]


@configuration
class NoShared:
    kind: Literal["none"] = "none"


@configuration
class AlwaysOn:
    """``count`` experts of ``width`` for every token, kept as one network of count * width (DeepSeekMoE)."""

    kind: Literal["always_on"] = "always_on"
    count: Size = 1
    width: Size


@configuration
class SigmoidGated:
    """One shared network times sigmoid(x w) (Qwen1.5-MoE, Qwen2-MoE)."""

    kind: Literal["sigmoid_gated"] = "sigmoid_gated"
    width: Size


Shared = Annotated[NoShared | AlwaysOn | SigmoidGated, Field(discriminator="kind")]


@configuration
class MoE:
    """``experts`` routed experts of ``width`` behind a router, beside shared experts.

    With ``latent`` the routed experts read and write vectors of that size, between one projection down and
    one up that all of them share; router and shared experts stay on the hidden size (LatentMoE, 2601.18089).
    """

    experts: Size
    width: Size
    latent: Size | None = None
    activation: Activation = "swiglu"
    router: Router
    admission: Admission = Dropless()
    balance: Balance = Balance()
    shared: Shared = NoShared()

    def __post_init__(self) -> None:
        if self.most_active > self.experts:
            raise ConsiliumError(
                f"moe: top-{self.most_active} of {self.experts} experts is impossible;"
                f" lower k to at most {self.experts} or add experts."
            )
        if isinstance(self.router.select, TopK) and self.router.select.groups is not None:
            self._check_groups(self.router.select.k, self.router.select.groups)
        if isinstance(self.router.select, TwoLevel):
            self._check_levels(self.router.select)
        if not isinstance(self.balance.bias, NoBias) and self.router.offset == "none":
            raise ConsiliumError(
                "moe.balance.bias moves a bias that moe.router.offset 'none' never reads;"
                " set offset to 'scores'."
            )
        if isinstance(self.balance.bias, QuantileBias):
            self._check_quantile()
        self._check_devices()
        if self.balance.losses and isinstance(self.router.projection, NoGate):
            raise ConsiliumError(
                "moe.balance: a loss moves the logits of a gate, and moe.router.projection 'none' has none;"
                " remove the losses or choose projection 'linear'."
            )
        for loss in self.balance.losses:
            if isinstance(loss, LoadLoss):
                self._check_load()
            if isinstance(loss, AdaptiveLoss) and not self._drops:
                raise ConsiliumError(
                    "moe.balance: the coefficient of the adaptive loss follows drops and decays to zero where"
                    " nothing drops; set moe.admission to kind 'capacity', where experts choose also select"
                    " to 'top_k', or use another loss."
                )

    def _check_quantile(self) -> None:
        """The rank of a margin is that of a choice among all experts (Megatron has no groups here either)."""
        select = self.router.select
        if not isinstance(select, TopK) or select.groups is not None or select.k == self.experts:
            raise ConsiliumError(
                "moe.balance.bias: quantile balancing needs moe.router.select 'top_k' without groups and with"
                " fewer than all experts; set it, or bias to kind 'linear'."
            )

    def _check_load(self) -> None:
        """The chance that the loss reads is that of being among the highest noisy logits (eq. 9)."""
        router = self.router
        ungrouped = isinstance(router.select, TopK) and router.select.groups is None
        plain = (ungrouped or isinstance(router.select, TwoLevel)) and router.offset == "none"
        if not plain or router.transforms or not isinstance(router.noise, LearnedNoise):
            raise ConsiliumError(
                "moe.balance: the load loss needs moe.router.noise of kind 'learned' and a choice by the"
                " noisy logits alone (select 'top_k' without groups or 'two_level', offset 'none', transforms"
                " empty); set them or use the importance loss."
            )

    def _check_groups(self, k: int, groups: Groups) -> None:
        size, rest = divmod(self.experts, groups.count)
        if rest:
            raise ConsiliumError(
                f"moe.router: {self.experts} experts are not divisible into {groups.count} groups;"
                " groups need equal size, so choose a count that divides the experts."
            )
        if groups.keep > groups.count or groups.keep * size < k or (groups.score == "top2_sum" and size < 2):
            raise ConsiliumError(
                f"moe.router: keeping {groups.keep} of {groups.count} groups of {size} experts leaves too few"
                f" for top-{k} by {groups.score}; keep more groups or use fewer, larger ones."
            )

    def _check_levels(self, levels: TwoLevel) -> None:
        if any(isinstance(loss, ZLoss) for loss in self.balance.losses):
            raise ConsiliumError(
                "moe.balance: with moe.router.select 'two_level' logits are log-probabilities and the z-loss"
                " is always zero; remove it."
            )
        size, rest = divmod(self.experts, levels.groups)
        if rest or levels.keep > levels.groups or levels.k > size:
            raise ConsiliumError(
                f"moe.router: {levels.k} experts in each of {levels.keep} of {levels.groups} equal groups"
                f" cannot be chosen from {self.experts} experts; choose groups that divide them and lower"
                " keep or k."
            )

    def _check_devices(self) -> None:
        counts = [
            loss.devices for loss in self.balance.losses if isinstance(loss, DeviceLoss | CommunicationLoss)
        ]
        if isinstance(self.admission, DeviceCapacity):
            counts.append(self.admission.devices)
        for count in counts:
            if self.experts % count:
                raise ConsiliumError(
                    f"moe: {self.experts} experts are not divisible among {count} devices;"
                    " choose a number of devices that divides the experts."
                )

    def expert_size(self, hidden_size: int) -> int:
        """Size of the vectors that routed experts read and write."""
        return hidden_size if self.latent is None else self.latent

    @property
    def matrices(self) -> int:
        """Matrices of an expert."""
        return matrices(self.activation)

    @property
    def most_active(self) -> int:
        """K: the most routed experts that one token may use."""
        most = self.router.most_active
        return self.experts if most is None else most

    @property
    def active_experts(self) -> float:
        """Routed experts a token uses: the average for expert choice, the most for all other selectors."""
        select = self.router.select
        return min(select.factor, self.experts) if isinstance(select, ExpertChoice) else self.most_active

    @property
    def _drops(self) -> bool:
        """Whether training may drop a choice; the capacity of expert choice is every token."""
        return not isinstance(self.admission, Dropless) and not isinstance(self.router.select, ExpertChoice)

    @property
    def causal(self) -> bool:
        """Whether no token's routing depends on later tokens outside training; see also ``independent``.

        Later tokens may change but not their number: a capacity that always holds counts them.
        """
        drops = isinstance(self.admission, Capacity) and self.admission.scope == "always"
        return not isinstance(self.router.select, ExpertChoice) and (not drops or self._drops_last_come)

    @property
    def causal_in_training(self) -> bool:
        """The same in training, where limits drop copies and Sinkhorn's plan weighs a whole micro-batch."""
        drops = not isinstance(self.admission, Dropless)
        alone = not isinstance(self.router.select, ExpertChoice | Sinkhorn)
        return alone and (not drops or self._drops_last_come)

    @property
    def divisible(self) -> bool:
        """Whether a training pass may route its tokens a part at a time: none waits, draws or gives way."""
        waits = isinstance(self.router.select, ExpertChoice | Sinkhorn | SampledSecond)
        draws = not isinstance(self.router.noise, NoNoise)
        return isinstance(self.admission, Dropless) and not waits and not draws

    @property
    def _drops_last_come(self) -> bool:
        """Whether a drop depends on earlier tokens alone.

        By position that holds for one choice a token: with two, all first choices go before any second one
        (GShard), so that a later token's first can take the place of an earlier token's second.
        """
        by_position = isinstance(self.admission, Capacity) and self.admission.by == "position"
        return by_position and self.most_active == 1

    @property
    def shared_width(self) -> int:
        match self.shared:
            case NoShared():
                return 0
            case AlwaysOn(count=count, width=width):
                return count * width
            case SigmoidGated(width=width):
                return width

    @property
    def independent(self) -> bool:
        """Whether outside training a token is routed alike in any company, which generation needs.

        More than ``causal``: a pass also holds other texts, and with a cache it lacks the tokens before.
        """
        drops = isinstance(self.admission, Capacity) and self.admission.scope == "always"
        return not drops and not isinstance(self.router.select, ExpertChoice)
