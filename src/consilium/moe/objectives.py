"""What each balance loss of a configuration is worth in one pass, its coefficient included.

Legend: T tokens, E experts, K choices a token, S segments, N devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from consilium.config.balance import (
    AdaptiveLoss,
    BalanceLoss,
    CommunicationLoss,
    DeviceLoss,
    ImportanceLoss,
    LoadLoss,
    Scope,
    SequenceLoss,
    SwitchLoss,
    ZLoss,
)
from consilium.moe.losses import (
    Segments,
    by_sequence,
    communication_loss,
    copies,
    device_loss,
    expert_loss,
    fractions,
    importance_loss,
    load_loss,
    normalised,
    sent,
    uniformity_loss,
    whole_batch,
    z_loss,
)
from consilium.moe.ordering import highest
from consilium.moe.types import Counted, LayerMode, Routing, Tokens


@final
@dataclass(frozen=True, slots=True)
class Seen:
    """What a loss may look at."""

    routing: Routing
    """As admitted; losses read what was wanted."""
    tokens: Tokens
    mode: LayerMode
    counted: Counted
    """Of this pass."""
    sequence: Literal["document", "row"]
    coefficient: Tensor | None
    """Of the adaptive loss."""

    @property
    def experts(self) -> int:
        return self.routing.scores_TE.shape[1]

    @property
    def shares_TE(self) -> Tensor:
        """Probabilities over all experts, not only those chosen."""
        return normalised(self.routing.scores_TE)

    @property
    def batch(self) -> Segments:
        return self.segments("batch")

    def segments(self, scope: Scope) -> Segments:
        """What a loss is averaged over; losses over a step take their counts from elsewhere."""
        tokens, average = self.tokens, self.mode.average
        match scope, self.sequence:
            case "sequence", "document":
                return by_sequence(tokens, tokens.sequence_T, None if average is None else average.documents)
            case "sequence", "row":
                row_T = tokens.sequence_T if tokens.row_T is None else tokens.row_T
                return by_sequence(tokens, row_T, None if average is None else average.rows)
            case _:
                return whole_batch(tokens, None if average is None else average.tokens)

    def over_step(self, scope: Literal["global", "step"]) -> Counted:
        """Counts of the micro-batches so far, or of all, over all ranks."""
        match scope:
            case "global":
                earlier = self.mode.earlier
                so_far = self.counted if earlier is None else earlier + self.counted
                return so_far.over(self.mode.reduce)
            case "step":
                return self.counted.over(self.mode.reduce) if self.mode.whole is None else self.mode.whole

    def fractions(self, scope: Scope) -> Tensor:
        """Load fractions f [S, E], without gradient."""
        match scope:
            case "global" | "step":
                return fractions(self.over_step(scope).wanted_E[None])
            case "batch" | "sequence":
                routing = self.routing
                return self.fractions_of(routing.experts_TK, routing.wanted_TK, self.segments(scope))

    def fractions_of(self, experts_TK: Tensor, wanted_TK: Tensor, segments: Segments) -> Tensor:
        return fractions(copies(experts_TK, wanted_TK, self.experts, segments))


def balance_loss(loss: BalanceLoss, seen: Seen) -> Tensor:
    """float32 scalar with gradient, coefficient included."""
    match loss:
        case SwitchLoss(coefficient=coefficient):
            return coefficient * _switch(loss, seen)
        case SequenceLoss(coefficient=coefficient):
            return coefficient * _sequence(loss, seen)
        case DeviceLoss(coefficient=coefficient, devices=devices, scope=scope):
            segments = seen.segments(scope)
            p_SE = segments.means(seen.shares_TE)
            return coefficient * device_loss(seen.fractions(scope), p_SE, devices, segments)
        case CommunicationLoss(coefficient=coefficient):
            return coefficient * _communication(loss, seen)
        case ImportanceLoss(coefficient=coefficient):
            value = importance_loss(seen.routing.experts_TK, seen.routing.weights_TK, seen.experts)
            return coefficient * seen.batch.average(value[None])
        case LoadLoss(coefficient=coefficient):
            assert seen.routing.chance_TE is not None, "the load loss needs learned noise"
            value = load_loss(seen.routing.chance_TE, seen.tokens.valid_T)
            return coefficient * seen.batch.average(value[None])
        case ZLoss(coefficient=coefficient):
            return coefficient * z_loss(seen.routing.clean_TE, seen.batch)
        case AdaptiveLoss():
            assert seen.coefficient is not None, "an adaptive loss has a coefficient"
            return seen.coefficient * uniformity_loss(seen.batch.means(seen.shares_TE), seen.batch)


def _switch(loss: SwitchLoss, seen: Seen) -> Tensor:
    match loss.counts:
        case "all":
            f_SE = seen.fractions(loss.scope)
        case "first":
            first_T1 = seen.routing.experts_TK[:, :1]
            f_SE = seen.fractions_of(first_T1, seen.routing.wanted_TK[:, :1], seen.batch)
    return expert_loss(f_SE, seen.batch.means(seen.shares_TE), seen.batch)


def _sequence(loss: SequenceLoss, seen: Seen) -> Tensor:
    segments = seen.segments("sequence")
    match loss.counts:
        case "routed":
            f_SE = seen.fractions("sequence")
        case "scores":
            # DeepSeek-V3 equation 18 as printed: the top k of the scores without bias.
            scores_TE = seen.routing.scores_TE.detach()
            experts_TK = highest(scores_TE, seen.routing.experts_TK.shape[1])
            f_SE = seen.fractions_of(experts_TK, seen.tokens.valid_T[:, None].expand_as(experts_TK), segments)
    return expert_loss(f_SE, segments.means(seen.shares_TE), segments)


def _communication(loss: CommunicationLoss, seen: Seen) -> Tensor:
    segments = seen.segments(loss.scope)
    match loss.scope:
        case "global" | "step":
            counted = seen.over_step(loss.scope)
            assert counted.sent_N is not None, "a loss over the step counts what is sent"
            sent_SN = counted.sent_N[None] / counted.tokens.clamp_min(1)
        case "batch" | "sequence":
            routing, size = seen.routing, seen.experts // loss.devices
            sent_TN = sent(routing.experts_TK, routing.wanted_TK, size, loss.devices)
            sent_SN = segments.means(sent_TN.float())
    return communication_loss(sent_SN, segments.means(seen.shares_TE), loss.most, segments)
