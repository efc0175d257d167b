"""Held-out documents cut into windows.

Legend: W windows, S tokens of one, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from consilium.data.encoding import TokenizedText

_TOGETHER: Final = 2**20
"""Targets looked at at once."""


@dataclass(frozen=True, slots=True)
class Windows:
    first_W: NDArray[np.int64]
    """Index of the first input token among the stored tokens."""
    length_W: NDArray[np.int64]
    seen_W: NDArray[np.int64]
    """How many of its targets, from the first one on, are those of the window before: context alone."""

    @property
    def fresh_W(self) -> NDArray[np.int64]:
        """Targets that count."""
        return self.length_W - self.seen_W

    def rows(self, chosen: slice | NDArray[np.int64]) -> Windows:
        return Windows(self.first_W[chosen], self.length_W[chosen], self.seen_W[chosen])


def cut_windows(text: TokenizedText, sequence_length: int, stride: int | None = None) -> Windows:
    """Cut documents into windows of up to ``sequence_length`` inputs, in which every token counts once.

    A window begins ``stride`` tokens after the one before, by default as many as it has; with fewer, all but
    a document's first tokens have at least ``sequence_length - stride`` tokens of context.
    """
    step = sequence_length if stride is None else stride
    assert 0 < step <= sequence_length
    # A document of n tokens is stored as n + 1 and so has n targets.
    targets_N = text.ends_N - text.starts_N - 1
    count_N = np.where(targets_N > 0, 1 + -(-np.maximum(targets_N - sequence_length, 0) // step), 0)
    offset_W = np.arange(count_N.sum()) - np.repeat(np.cumsum(count_N) - count_N, count_N)
    done_W = offset_W * step
    length_W = np.minimum(np.repeat(targets_N, count_N) - done_W, sequence_length)
    seen_W = np.where(offset_W > 0, sequence_length - step, 0)
    return Windows(np.repeat(text.starts_N, count_N) + done_W, length_W, seen_W)


def learned_windows(windows: Windows, text: TokenizedText) -> Windows:
    """Keep windows with a target that is learned: the others say nothing of the model."""
    if not len(text.learned_T) or not len(windows.first_W):
        return windows
    place_S = np.arange(windows.length_W.max())
    rows = max(1, _TOGETHER // len(place_S))
    kept: list[NDArray[np.bool_]] = []
    for start in range(0, len(windows.first_W), rows):
        part = windows.rows(slice(start, start + rows))
        fresh_WS = (place_S >= part.seen_W[:, None]) & (place_S < part.length_W[:, None])
        target_WS = np.where(fresh_WS, part.first_W[:, None] + 1 + place_S, 0)
        kept.append((fresh_WS & text.learned(target_WS)).any(axis=1))
    return windows.rows(np.flatnonzero(np.concatenate(kept)))


def limit_windows(windows: Windows, limit_tokens: int | None) -> Windows:
    """Keep windows spread evenly over all, of at most ``limit_tokens`` targets but at least one window."""
    total = int(windows.fresh_W.sum())
    if limit_tokens is None or total <= limit_tokens:
        return windows
    available = len(windows.first_W)
    wanted = max(1, available * limit_tokens // total)
    chosen = (2 * np.arange(wanted) + 1) * available // (2 * wanted)
    within = np.cumsum(windows.fresh_W[chosen]) <= limit_tokens
    return windows.rows(chosen[: max(1, int(within.sum()))])
