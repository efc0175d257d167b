"""The router as data: score, select, weigh, behind a projection, logit transforms and noise.

Each choice is a closed union; ``consilium.moe.routing.router`` implements every member.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from consilium.config.base import Size, configuration
from consilium.errors import ConsiliumError


@configuration
class LinearGate:
    """logits = x W."""

    kind: Literal["linear"] = "linear"
    bias: bool = False


@configuration
class MLPGate:
    """logits = tanh(x W1) W2 with W1 of E columns (LLaMA-MoE, 2406.16554)."""

    kind: Literal["mlp"] = "mlp"


@configuration
class NoGate:
    """No learned gate: logits are zero, and the selector decides without them (Hash layers, 2106.04426)."""

    kind: Literal["none"] = "none"


Projection = Annotated[LinearGate | MLPGate | NoGate, Field(discriminator="kind")]


@configuration
class Standardise:
    """scale * (z - mean) / std over the experts of each token (Skywork-MoE, 2406.06563 eq. 3)."""

    kind: Literal["standardise"] = "standardise"
    scale: PositiveFloat = 1.0
    epsilon: PositiveFloat = 1e-6


@configuration
class Softcap:
    """cap * tanh(z / cap)."""

    kind: Literal["softcap"] = "softcap"
    cap: PositiveFloat


Transform = Annotated[Standardise | Softcap, Field(discriminator="kind")]


@configuration
class NoNoise:
    kind: Literal["none"] = "none"


@configuration
class Jitter:
    """Router input times U(1 - epsilon, 1 + epsilon) in training, unseen by experts (Switch, 2101.03961)."""

    kind: Literal["jitter"] = "jitter"
    epsilon: PositiveFloat = 1e-2


@configuration
class LearnedNoise:
    """logits + N(0,1) * (softplus(x W_noise) + floor) in training (Shazeer 2017, 1701.06538 eq. 4)."""

    kind: Literal["learned"] = "learned"
    floor: NonNegativeFloat = 0.0


Noise = Annotated[NoNoise | Jitter | LearnedNoise, Field(discriminator="kind")]


@configuration
class Softmax:
    kind: Literal["softmax"] = "softmax"


@configuration
class Sigmoid:
    kind: Literal["sigmoid"] = "sigmoid"


@configuration
class SqrtSoftplus:
    kind: Literal["sqrt_softplus"] = "sqrt_softplus"


@configuration
class Relu:
    kind: Literal["relu"] = "relu"


Score = Annotated[Softmax | Sigmoid | SqrtSoftplus | Relu, Field(discriminator="kind")]


@configuration
class Groups:
    """Keep the best ``keep`` of ``count`` equal groups of experts; the others are masked with -inf.

    A group's score is its maximum (DeepSeek-V2) or the sum of its two highest (DeepSeek-V3).
    """

    count: Size
    keep: Size
    score: Literal["max", "top2_sum"]


@configuration
class TopK:
    kind: Literal["top_k"] = "top_k"
    k: Size
    groups: Groups | None = None


@configuration
class Sinkhorn:
    """In training the k highest of each token in a balanced plan, outside it the k highest scores.

    Sinkhorn's iterations scale exp(logits) until every token sends, and every expert of the micro-batch
    receives, its share (S-BASE: Clark et al. 2022, 2202.01169; Megatron). Weights are those of the scores.
    """

    kind: Literal["sinkhorn"] = "sinkhorn"
    k: Size
    iterations: Size = 20


@configuration
class SampledSecond:
    """Top-2; in training the second is dispatched with probability min(1, 2 g2) (GShard, 2006.16668)."""

    kind: Literal["sampled_second"] = "sampled_second"


@configuration
class Threshold:
    """Every expert whose selection score exceeds ``minimum``, at most ``most``; for ReLU, minimum 0."""

    kind: Literal["threshold"] = "threshold"
    minimum: float = 0.0
    most: Size


@configuration
class TopP:
    """The smallest set of experts whose scores sum to ``p``, at most ``most`` (2403.07652)."""

    kind: Literal["top_p"] = "top_p"
    p: Annotated[float, Field(gt=0, le=1)]
    most: Size


@configuration
class ExpertChoice:
    """Each expert takes its best ``factor * T / E`` tokens (2202.09368).

    Not causal: the future of a batch matters.
    """

    kind: Literal["expert_choice"] = "expert_choice"
    factor: PositiveFloat = 2.0


@configuration
class Hash:
    """A fixed random table from token id to ``k`` experts (Hash layers, 2106.04426)."""

    kind: Literal["hash"] = "hash"
    k: Size = 1
    vocab_size: Size
    seed: int = 0


@configuration
class TwoLevel:
    """A primary gate keeps the best ``keep`` of ``groups`` equal groups, a secondary ``k`` experts in each.

    A weight is the product of a softmax over the kept groups and one over the kept experts of the group
    (Shazeer 2017, 1701.06538 appendix B).
    """

    kind: Literal["two_level"] = "two_level"
    groups: Size
    keep: Size = 2
    k: Size = 2


Select = Annotated[
    TopK | Sinkhorn | SampledSecond | Threshold | TopP | ExpertChoice | Hash | TwoLevel,
    Field(discriminator="kind"),
]


@configuration
class Raw:
    """The score itself."""

    kind: Literal["raw"] = "raw"


@configuration
class Normalised:
    """Scores of the selected divided by their sum plus epsilon."""

    kind: Literal["normalised"] = "normalised"
    epsilon: NonNegativeFloat = 1e-20


@configuration
class ClampedSum:
    """Scores of the selected divided by max(sum, minimum) (ERNIE 4.5)."""

    kind: Literal["clamped_sum"] = "clamped_sum"
    minimum: PositiveFloat


@configuration
class SoftmaxOfSelected:
    """Softmax over the logits of the selected (Shazeer 2017 eq. 3)."""

    kind: Literal["softmax_of_selected"] = "softmax_of_selected"


@configuration
class Uniform:
    """Weight 1 for each selected expert (Hash layers)."""

    kind: Literal["uniform"] = "uniform"


Weight = Annotated[Raw | Normalised | ClampedSum | SoftmaxOfSelected | Uniform, Field(discriminator="kind")]


def most_active(select: Select) -> int | None:
    """The most experts that one token may use; None where experts choose, which sets no limit."""
    match select:
        case TopK(k=k) | Sinkhorn(k=k) | Hash(k=k):
            return k
        case SampledSecond():
            return 2
        case TwoLevel(keep=keep, k=k):
            return keep * k
        case Threshold(most=most) | TopP(most=most):
            return most
        case ExpertChoice():
            return None


@configuration
class Router:
    """score, select, weigh.

    ``offset`` says where the balance bias enters the selection; it never enters weights.

    ``scale`` multiplies the weights after normalisation; ``weight_on="input"`` multiplies the expert's
    input instead of its output (Llama 4).
    """

    projection: Projection = LinearGate()
    noise: Noise = NoNoise()
    transforms: tuple[Transform, ...] = ()
    score: Score = Softmax()
    offset: Literal["none", "scores", "logits"] = "none"
    select: Select
    weight: Weight = Normalised()
    scale: PositiveFloat = 1.0
    weight_on: Literal["output", "input"] = "output"

    def __post_init__(self) -> None:
        if self.most_active == 1 and isinstance(self.weight, Normalised | ClampedSum | SoftmaxOfSelected):
            raise ConsiliumError(
                f"moe.router: weight {self.weight.kind!r} of a single expert is 1 and gives the router no"
                " gradient; use weight kind 'raw' (Switch) or select at least 2 experts."
            )
        if isinstance(self.projection, NoGate) and not isinstance(self.select, Hash):
            raise ConsiliumError(
                "moe.router: projection 'none' leaves every logit at zero, so only select kind 'hash' can use"
                " it; choose projection 'linear'."
            )
        if isinstance(self.select, TwoLevel) and not (
            isinstance(self.score, Softmax) and isinstance(self.weight, SoftmaxOfSelected)
        ):
            raise ConsiliumError(
                "moe.router: select 'two_level' is defined for score 'softmax' and weight"
                " 'softmax_of_selected'; set both."
            )
        if isinstance(self.select, TwoLevel) and (self.transforms or self.offset != "none"):
            raise ConsiliumError(
                "moe.router: select 'two_level' has two sets of logits, so transforms must be empty and"
                " offset 'none'; remove them."
            )
        if isinstance(self.select, TopP | Threshold) and self.offset == "logits":
            raise ConsiliumError(
                "moe.router: offset 'logits' needs a top-k selector; use offset 'scores' or 'none'."
            )
        if isinstance(self.select, Hash | ExpertChoice | Sinkhorn) and self.offset != "none":
            raise ConsiliumError(
                f"moe.router: select {self.select.kind!r} leaves a bias nothing to balance, as the loads are"
                " fixed without it; set offset to 'none' and moe.balance.bias to kind 'none'."
            )

    @property
    def most_active(self) -> int | None:
        return most_active(self.select)

    @property
    def served(self) -> Router:
        """The router that chooses outside training as this one does."""
        if not isinstance(self.select, Sinkhorn):
            return self
        return dataclasses.replace(self, select=TopK(k=self.select.k))

    def gate_rows(self, experts: int) -> int:
        """Rows of the matrices that the router's input meets: those of the gates and of their noise."""
        outputs = experts + (self.select.groups if isinstance(self.select, TwoLevel) else 0)
        gates = not isinstance(self.projection, NoGate)
        return outputs * (gates + isinstance(self.noise, LearnedNoise))
