"""Bytes that a process sends where experts are dealt over several. No torch.

A token's row travels once to each process that has experts of its choice, with K numbers of experts (int32)
and K weights (float32) beside it; one row of sums comes back. Gradients go the other way. What stays in the
process is not sent and not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from consilium.config.moe import MoE
from consilium.config.router import Groups, TopK, TwoLevel
from consilium.errors import ConsiliumError

NUMBER = 4
"""Bytes of an expert's number, and of a weight."""
COUNT = 8
"""Bytes of the count of rows that each process is told first."""


@dataclass(frozen=True, slots=True)
class ExchangeBytes:
    """Of one MoE layer in one pass."""

    counts: int
    dispatch: int
    combine: int
    dispatch_back: int
    combine_back: int

    @property
    def total(self) -> int:
        return self.counts + self.dispatch + self.combine + self.dispatch_back + self.combine_back


@dataclass(frozen=True, slots=True)
class Crossing:
    """Rows that go from a process to others, and rows that come to it from them."""

    leaving: float
    arriving: float


def exchange_bytes(
    moe: MoE, hidden: int, crossing: Crossing, *, processes: int, itemsize: int = 4
) -> ExchangeBytes:
    """Bytes that a process sends in one layer; ``itemsize`` is that of the rows' values."""
    width, k = moe.expert_size(hidden), moe.most_active
    wide = max(itemsize, 4)
    row = _whole(width * itemsize + 2 * NUMBER * k, wide)
    gradient = _whole(width * itemsize + NUMBER * k, wide)
    return ExchangeBytes(
        counts=COUNT * (processes - 1),
        dispatch=round(crossing.leaving * row),
        combine=round(crossing.arriving * width * wide),
        dispatch_back=round(crossing.arriving * gradient),
        combine_back=round(crossing.leaving * width * wide),
    )


def balanced(moe: MoE, tokens: int, *, processes: int) -> Crossing:
    """What crosses where every expert is as likely as every other and each process has ``tokens``."""
    elsewhere = tokens * processes_per_token(moe, processes) * (processes - 1) / processes
    return Crossing(elsewhere, elsewhere)


def processes_per_token(moe: MoE, processes: int) -> float:
    """Processes that a token's row reaches on average, the own one among them, were all choices as likely.

    Groups of a router that are at least as many as the processes limit them: DeepSeek-V2 chooses among 3 of
    8 devices, V3 among 4 of 8 nodes.
    """
    if moe.experts % processes:
        raise ConsiliumError(f"{moe.experts} experts cannot be dealt evenly over {processes} processes.")
    reached = processes * (1 - _none_of(moe.experts // processes, moe.experts, moe.most_active))
    return min(reached, float(most_processes(moe, processes)))


def most_processes(moe: MoE, processes: int) -> int:
    """Processes that a token's row can reach at most."""
    limit = min(processes, moe.most_active)
    match moe.router.select:
        case TopK(groups=Groups(count=count, keep=keep)) | TwoLevel(groups=count, keep=keep):
            return min(limit, keep * max(1, -(-processes // count)))
        case _:
            return limit


def _none_of(some: int, every: int, drawn: int) -> float:
    """The chance that ``drawn`` of ``every`` contain none of ``some``."""
    return math.comb(every - some, drawn) / math.comb(every, drawn) if drawn <= every else 0.0


def _whole(size: int, widest: int) -> int:
    """Up to a whole number of a row's widest values."""
    return -(-size // widest) * widest
