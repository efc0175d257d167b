"""Balance losses as pure functions, before their coefficients. Counts carry no gradient; probabilities do.

Legend: T tokens, E experts, K choices a token, S segments (the micro-batch, or its sequences), N devices.

Values at perfect balance: Switch, sequence, expert and device losses 1; communication at most 1; importance,
load and Skywork's loss 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from consilium.moe.types import Tokens
from consilium.ops.counting import occurrences


@dataclass(frozen=True, slots=True)
class Segments:
    """Which tokens are averaged together."""

    index_T: Tensor
    """int64 in [0, count)."""
    valid_T: Tensor
    count: int
    unit: Literal["token", "segment"]
    """What weighs alike in the mean over the step: tokens of a micro-batch, or sequences of any length."""
    usual: float | None = None
    """Units of a micro-batch on average over the step: the mean of the step is the mean of its parts."""

    @property
    def tokens_S(self) -> Tensor:
        """int64 [S] valid tokens of each segment."""
        return occurrences(self.index_T, self.count, self.valid_T)

    def sums(self, values_TX: Tensor) -> Tensor:
        """Sums [S, X] over the valid tokens of each segment."""
        values_TX = values_TX.masked_fill(~self.valid_T[:, None], 0)
        if self.count == 1:
            return values_TX.sum(dim=0, keepdim=True)
        total_SX = values_TX.new_zeros(self.count, values_TX.shape[1])
        return total_SX.index_add(0, self.index_T, values_TX)

    def means(self, values_TX: Tensor) -> Tensor:
        """Means [S, X] over the valid tokens of each segment; zero where it has none."""
        return self.sums(values_TX) / self.tokens_S.clamp_min(1)[:, None]

    def average(self, losses_S: Tensor) -> Tensor:
        """Mean by units over segments with valid tokens, taken over as many units as are usual if given."""
        weight_S = self.tokens_S if self.unit == "token" else (self.tokens_S > 0).long()
        usual = weight_S.sum().clamp_min(1) if self.usual is None else self.usual or 1
        part_S = weight_S.to(losses_S.dtype) / usual
        return (losses_S.masked_fill(weight_S == 0, 0) * part_S).sum()


def whole_batch(tokens: Tokens, usual: float | None = None) -> Segments:
    return Segments(torch.zeros_like(tokens.sequence_T), tokens.valid_T, 1, "token", usual)


def by_sequence(tokens: Tokens, sequence_T: Tensor, usual: float | None = None) -> Segments:
    return Segments(sequence_T, tokens.valid_T, tokens.most_sequences, "segment", usual)


def normalised(scores_TE: Tensor) -> Tensor:
    """Scores divided by their sum over all experts (DeepSeek-V3 equation 19); softmax scores stay the same.

    A token whose scores all underflow to zero counts as uniform without gradient. An epsilon in the divisor
    would let the router lower its loss by pushing every sigmoid below it.
    """
    total_T1 = scores_TE.sum(dim=1, keepdim=True)
    shares_TE = scores_TE / total_T1.clamp_min(torch.finfo(scores_TE.dtype).tiny)
    return torch.where(total_T1 == 0, 1 / scores_TE.shape[1], shares_TE)


def entropy(scores_TE: Tensor, valid_T: Tensor) -> Tensor:
    """Mean over valid tokens of the entropy of normalised scores, in nats; zero without valid tokens."""
    entropy_T = torch.special.entr(normalised(scores_TE)).sum(dim=1)
    return entropy_T.masked_fill(~valid_T, 0).sum() / valid_T.sum().clamp_min(1)


def copies(experts_TK: Tensor, wanted_TK: Tensor, experts: int, segments: Segments) -> Tensor:
    """int64 [S, E] copies of each expert in each segment."""
    slot_TK = segments.index_T[:, None] * experts + experts_TK
    wanted_TK = wanted_TK & segments.valid_T[:, None]
    return occurrences(slot_TK, segments.count * experts, wanted_TK).view(-1, experts)


def fractions(copies_SE: Tensor) -> Tensor:
    """Each expert's share f [S, E] of its segment's copies times E, so 1 at balance.

    With k copies for each of T tokens this is the papers' E / (k T) times the count.
    """
    return copies_SE * (copies_SE.shape[1] / copies_SE.sum(dim=1, keepdim=True).clamp_min(1))


def expert_loss(f_SE: Tensor, p_SE: Tensor, segments: Segments) -> Tensor:
    """The sum of f P in each segment, averaged (Switch eq. 4, DeepSeekMoE eq. 12, DeepSeek-V3 eq. 17)."""
    return segments.average((f_SE * p_SE).sum(dim=1))


def device_loss(f_SE: Tensor, p_SE: Tensor, devices: int, segments: Segments) -> Tensor:
    """Mean f times summed P of each device's experts (DeepSeekMoE equations 15 to 17)."""
    f_SN = f_SE.unflatten(1, (devices, -1)).mean(dim=2)
    p_SN = p_SE.unflatten(1, (devices, -1)).sum(dim=2)
    return segments.average((f_SN * p_SN).sum(dim=1))


def sent(experts_TK: Tensor, wanted_TK: Tensor, size: int, devices: int) -> Tensor:
    """Whether, bool [T, N], a token reaches each device of ``size`` experts."""
    count_TN = experts_TK.new_zeros(experts_TK.shape[0], devices)
    return count_TN.scatter_add(1, experts_TK // size, wanted_TK.long()) > 0


def communication_loss(sent_SN: Tensor, p_SE: Tensor, most: int, segments: Segments) -> Tensor:
    """N / M times the tokens sent to each device, times its summed P (DeepSeek-V2 equations 29 to 31)."""
    devices = sent_SN.shape[1]
    p_SN = p_SE.unflatten(1, (devices, -1)).sum(dim=2)
    return segments.average((sent_SN * (devices / most) * p_SN).sum(dim=1))


def squared_variation(total_E: Tensor) -> Tensor:
    """Squared coefficient of variation, population variance over squared mean; zero for all zeros."""
    mean = total_E.mean()
    return (total_E - mean).square().mean() / mean.square().clamp_min(torch.finfo(total_E.dtype).tiny)


def importance_loss(experts_TK: Tensor, weights_TK: Tensor, experts: int) -> Tensor:
    """Variation of the weights summed over tokens (Shazeer 2017 equations 6 and 7)."""
    total_E = weights_TK.new_zeros(experts).index_add(0, experts_TK.flatten(), weights_TK.flatten())
    return squared_variation(total_E)


def load_loss(chance_TE: Tensor, valid_T: Tensor) -> Tensor:
    """Variation of the smooth load, the chances summed over tokens (Shazeer 2017 equations 10 and 11)."""
    return squared_variation(chance_TE.masked_fill(~valid_T[:, None], 0).sum(dim=0))


def z_loss(clean_TE: Tensor, segments: Segments) -> Tensor:
    """Mean over valid tokens of the squared logsumexp of the clean logits (ST-MoE equation 5)."""
    square_T1 = clean_TE.logsumexp(dim=1, keepdim=True).square()
    return segments.average(segments.means(square_T1)[:, 0])


def uniformity_loss(p_SE: Tensor, segments: Segments) -> Tensor:
    """The sum of (1/E - P)^2 (Skywork-MoE equation 4): it holds no counts."""
    return segments.average((1 / p_SE.shape[1] - p_SE).square().sum(dim=1))
