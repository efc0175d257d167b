"""Which domain each row of training comes from, in closed form, so that a resumed run needs no state.

Legend: D domains, P rows a period.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

PERIOD = 2**14
"""Rows in which shares come out exact but for one row a domain: a share of 1e-4 is more than a row."""
MOST_DOMAINS = 1024


@final
class DomainSchedule:
    """Rows of ``PERIOD`` repeat; inside a period domain d has its fixed number of rows, evenly spread."""

    def __init__(self, weights: Sequence[float]) -> None:
        """A domain gets rows in proportion to its weight, at least one."""
        counts_D = _apportion(np.array(weights, dtype=np.float64), PERIOD)
        # The i-th of n rows stands at (i + 1/2) / n of the period; ties go to the earlier domain.
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts_D])
        order_P = np.argsort(places, kind="stable")
        self._domain_P: NDArray[np.int64] = np.repeat(np.arange(len(weights)), counts_D)[order_P]
        ranks_P = np.concatenate([np.arange(count) for count in counts_D])
        self._rank_P: NDArray[np.int64] = ranks_P[order_P]
        self._counts_D: NDArray[np.int64] = counts_D

    @property
    def shares(self) -> tuple[float, ...]:
        """Fraction of the rows of each domain."""
        return tuple(float(count) / PERIOD for count in self._counts_D)

    def row(self, number: int) -> tuple[int, int]:
        """Return (domain, how many rows of that domain came before) of the ``number``-th row of the run."""
        period, place = divmod(number, PERIOD)
        domain = int(self._domain_P[place])
        return domain, period * int(self._counts_D[domain]) + int(self._rank_P[place])

    def dealt(self, number: int) -> NDArray[np.int64]:
        """Return how many rows of each domain are among the first ``number``."""
        period, place = divmod(number, PERIOD)
        begun_D = np.bincount(self._domain_P[:place], minlength=len(self._counts_D))
        return period * self._counts_D + begun_D


@final
class Schedule:
    """Schedules one after the other: from some row on the domains have other shares.

    A domain goes on where it was, so that no text is dealt twice or left out.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._first: list[int] = [0]
        self._before: list[NDArray[np.int64]] = [np.zeros(len(weights), dtype=np.int64)]
        self._parts: list[DomainSchedule] = [DomainSchedule(weights)]

    @property
    def shares(self) -> tuple[float, ...]:
        """Those of the newest part."""
        return self._parts[-1].shares

    def change(self, number: int, weights: Sequence[float]) -> None:
        """Deal by ``weights`` from the ``number``-th row on, which lies behind every change before."""
        assert number > self._first[-1], (number, self._first)
        dealt_D = self._before[-1] + self._parts[-1].dealt(number - self._first[-1])
        self._first.append(number)
        self._before.append(dealt_D)
        self._parts.append(DomainSchedule(weights))

    def row(self, number: int) -> tuple[int, int]:
        """Return (domain, how many rows of that domain came before) of the ``number``-th row of the run."""
        part = bisect.bisect_right(self._first, number) - 1
        domain, rank = self._parts[part].row(number - self._first[part])
        return domain, int(self._before[part][domain]) + rank


def _apportion(weights_D: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Give each domain one row and share out the others by largest remainder.

    What a domain gets beside its one row is what it lacks to its share, so that small ones are exact too.
    """
    exact_D = np.maximum(weights_D / weights_D.sum() * total - 1, 0)
    free = total - len(weights_D)
    assert free >= 0, f"{len(weights_D)} domains exceed a period of {total} rows"
    exact_D *= free / max(exact_D.sum(), 1e-9)
    counts_D = np.floor(exact_D).astype(np.int64)
    order = np.argsort(counts_D - exact_D, kind="stable")
    counts_D[order[: free - int(counts_D.sum())]] += 1
    return counts_D + 1
