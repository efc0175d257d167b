"""Margins of a step's tokens at each expert, and the quantile of them that balances the load.

A token's margin at an expert is its selection value there less its (k + 1)-th highest value, so that it
chooses where that is above zero. Taking from an expert's bias its (q + 1)-th highest margin leaves q tokens
above zero: the load that was asked for (Su 2026, the dual of the balanced assignment).

Legend: T tokens, E experts, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from consilium.moe.types import Reduce
from consilium.ops.counting import occurrences

BITS: Final = 32
PER_OCTAVE: Final = 16
LOWEST, HIGHEST = -20, 6
"""Octaves of a histogram: margins between 2^-20 and 2^6 are told apart, to a sixteenth of their octave."""
LEVELS: Final = (HIGHEST - LOWEST) * PER_OCTAVE
"""Bins of either sign."""


def margins(values_TE: Tensor, valid_T: Tensor, k: int) -> Tensor:
    """float32 [T, E]; -inf for padding and for tokens that have no more than k experts to choose from."""
    limit_T1 = values_TE.topk(k + 1, dim=1).values[:, k:]
    closed_T1 = ~valid_T[:, None] | (limit_T1 == -torch.inf)
    return (values_TE - limit_T1).masked_fill(closed_T1, -torch.inf)


@final
@dataclass(frozen=True, slots=True)
class Exact:
    """Every margin of a step."""

    parts: tuple[Tensor, ...]
    """float32 [T, E] each, of one micro-batch."""

    def __add__(self, other: Exact) -> Exact:
        return Exact(self.parts + other.parts)

    def beyond(self, rank: int, reduce: Reduce) -> Tensor:
        """The (rank + 1)-th highest margin of each expert, bit for bit.

        Floats are ordered as integers, whose bits are found from the highest down by counting: a sum over
        ranks is all that they need of each other, and no rank sees the margins of another.
        """
        keys = [_key(part_TE) for part_TE in self.parts]
        found_E = keys[0].new_zeros(keys[0].shape[1])
        for bit in reversed(range(BITS)):
            tried_E = found_E | (1 << bit)
            above_E = reduce(torch.stack([(key_TE >= tried_E).sum(dim=0) for key_TE in keys]).sum(dim=0))
            found_E = torch.where(above_E > rank, tried_E, found_E)
        return _value(found_E)


def _key(x: Tensor) -> Tensor:
    """int64 in [0, 2^32) in the order of the floats."""
    bits = x.view(torch.int32).long()
    return torch.where(bits >= 0, bits + 2**31, -bits - 1)


def _value(key: Tensor) -> Tensor:
    """Inverse of ``_key``."""
    return torch.where(key >= 2**31, key - 2**31, -key - 1).int().view(torch.float32)


@final
@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of margins by sign, octave and sixteenth."""

    counts_EB: Tensor
    """int64, from the lowest margins up."""

    @staticmethod
    def of(margins_TE: Tensor, valid_T: Tensor) -> Histogram:
        experts = margins_TE.shape[1]
        slot_TE = torch.arange(experts, device=margins_TE.device) * 2 * LEVELS + _bin(margins_TE)
        counts = occurrences(slot_TE, experts * 2 * LEVELS, valid_T[:, None].expand_as(slot_TE))
        return Histogram(counts.view(experts, 2 * LEVELS))

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(self.counts_EB + other.counts_EB)

    def beyond(self, rank: int, reduce: Reduce) -> Tensor:
        """The (rank + 1)-th highest margin of each expert as if those of a bin lay evenly in it."""
        counts_EB = reduce(self.counts_EB)
        above_EB = counts_EB.flip(1).cumsum(dim=1).flip(1)
        bin_E1 = ((above_EB > rank).sum(dim=1, keepdim=True) - 1).clamp_min(0)
        inside_E1 = counts_EB.gather(1, bin_E1)
        place_E1 = rank - (above_EB.gather(1, bin_E1) - inside_E1) + 0.5
        edges = _edges(counts_EB.device)
        top_E, bottom_E = edges[bin_E1[:, 0] + 1], edges[bin_E1[:, 0]]
        return (top_E - (place_E1 / inside_E1.clamp_min(1))[:, 0] * (top_E - bottom_E)).float()


def _bin(x: Tensor) -> Tensor:
    """int64 in [0, 2 LEVELS); what lies outside the octaves is in the nearest bin of its sign."""
    size = x.abs().clamp(2.0**LOWEST, 2.0**HIGHEST * (1 - 2.0**-24))
    mantissa, exponent = torch.frexp(size)
    level = (exponent.long() - 1 - LOWEST) * PER_OCTAVE + ((2 * mantissa - 1) * PER_OCTAVE).long()
    level = level.clamp(0, LEVELS - 1)
    return torch.where(x >= 0, LEVELS + level, LEVELS - 1 - level)


def _edges(device: torch.device) -> Tensor:
    """float64 [2 LEVELS + 1]; the bins beside zero reach it."""
    level = torch.arange(1, LEVELS + 1, device=device, dtype=torch.float64)
    octave = (level / PER_OCTAVE).floor()
    size = torch.exp2(LOWEST + octave) * (1 + level / PER_OCTAVE - octave)
    return torch.cat((-size.flip(0), size.new_zeros(1), size))
