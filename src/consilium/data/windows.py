"""Held-out documents cut into windows.

Legend: W windows, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consilium.data.encoding import TokenizedText


@dataclass(frozen=True, slots=True)
class Windows:
    first_W: NDArray[np.int64]
    """Index of the first input token among the stored tokens."""
    length_W: NDArray[np.int64]


def cut_windows(text: TokenizedText, sequence_length: int) -> Windows:
    """Cut documents into windows of up to ``sequence_length`` inputs, whose targets are every token once."""
    # A document of n tokens is stored as n + 1 and so has n targets.
    targets_N = text.ends_N - text.starts_N - 1
    count_N = -(-targets_N // sequence_length)
    offset_W = np.arange(count_N.sum()) - np.repeat(np.cumsum(count_N) - count_N, count_N)
    done_W = offset_W * sequence_length
    length_W = np.minimum(np.repeat(targets_N, count_N) - done_W, sequence_length)
    return Windows(np.repeat(text.starts_N, count_N) + done_W, length_W)


def limit_windows(windows: Windows, limit_tokens: int | None) -> Windows:
    """Keep windows spread evenly over all, of at most ``limit_tokens`` targets but at least one window."""
    total = int(windows.length_W.sum())
    if limit_tokens is None or total <= limit_tokens:
        return windows
    available = len(windows.first_W)
    wanted = max(1, available * limit_tokens // total)
    chosen = (2 * np.arange(wanted) + 1) * available // (2 * wanted)
    within = np.cumsum(windows.length_W[chosen]) <= limit_tokens
    chosen = chosen[: max(1, int(within.sum()))]
    return Windows(windows.first_W[chosen], windows.length_W[chosen])
