"""One domain's documents as an endless stream, cut into rows of equal length.

Legend: N documents, S tokens a row, T places in the stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from consilium.data.encoding import TokenizedText
from consilium.data.shuffle import permutation


@dataclass(frozen=True, slots=True)
class Row:
    """``targets_S`` is one token ahead of ``ids_S``, -1 where that is not learned.

    The target of a document's last token is what opens the next, learned where the last token is.
    """

    ids_S: NDArray[np.int64]
    targets_S: NDArray[np.int64]
    sequence_S: NDArray[np.int64]
    """Document number inside the row, from 0."""
    position_S: NDArray[np.int64]
    """Position inside the document as cut by the row, from 0."""


@dataclass(frozen=True, slots=True)
class _Epoch:
    order_N: NDArray[np.int64]
    """Which document stands at each place of this epoch."""
    starts_N: NDArray[np.int64]
    """Where it starts, in tokens from the start of the epoch."""


@final
class PackedDomain:
    """Epoch e of the stream holds every document once, in the order of the permutation (seed, domain, e).

    Row r is the stream's [r S, (r + 1) S), which may cross from one epoch into the next: no token is dropped
    and none is padding. Rows are drawn in shuffled blocks of an epoch's length, so that the neighbours of a
    row in its batch are of other documents.
    """

    def __init__(self, text: TokenizedText, sequence_length: int, *key: int | str) -> None:
        assert text.token_count >= sequence_length
        self._text = text
        self._lengths_N: NDArray[np.int64] = text.ends_N - text.starts_N
        self._S = sequence_length
        self._key = key
        # The rows of a block touch two epochs, three when a batch crosses into the next block.
        self._epoch: Callable[[int], _Epoch] = functools.lru_cache(maxsize=4)(self._make_epoch)
        self._block: Callable[[int], NDArray[np.int64]] = functools.lru_cache(maxsize=2)(self._make_block)

    @property
    def rows_per_epoch(self) -> int:
        """Whole rows in one pass over the documents; the next row goes on into the next pass."""
        return self._text.token_count // self._S

    def row(self, number: int) -> Row:
        """Return the ``number``-th row that training draws."""
        block, place = divmod(number, self.rows_per_epoch)
        first = (block * self.rows_per_epoch + int(self._block(block)[place])) * self._S
        # One more place than inputs: targets are the same stream one place on.
        place_T = np.arange(first, first + self._S + 1)
        epoch_T, within_T = np.divmod(place_T, self._text.token_count)
        source_T, start_T = self._locate(epoch_T, within_T)
        ids_T = self._text.ids_T[source_T].astype(np.int64)
        start_T = place_T - within_T + start_T
        new_T = np.diff(start_T, prepend=start_T[:1]) > 0
        learned_T = self._text.learned(source_T)
        learned_S = np.where(place_T[1:] == start_T[1:], learned_T[:-1], learned_T[1:])
        return Row(
            ids_T[:-1],
            np.where(learned_S, ids_T[1:], -1),
            np.cumsum(new_T[:-1], dtype=np.int64),
            place_T[:-1] - np.maximum(start_T[:-1], first),
        )

    def _locate(
        self, epoch_T: NDArray[np.int64], within_T: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return each place's index into the stored tokens, and where its document starts in its epoch."""
        source_T, start_T = np.empty_like(within_T), np.empty_like(within_T)
        for number in np.unique(epoch_T).tolist():
            here = epoch_T == number
            epoch = self._epoch(number)
            place = np.searchsorted(epoch.starts_N, within_T[here], side="right") - 1
            start_T[here] = epoch.starts_N[place]
            source_T[here] = self._text.starts_N[epoch.order_N[place]] + within_T[here] - start_T[here]
        return source_T, start_T

    def _make_epoch(self, number: int) -> _Epoch:
        order_N = permutation(len(self._lengths_N), *self._key, "documents", number)
        lengths_N = self._lengths_N[order_N]
        return _Epoch(order_N, np.cumsum(lengths_N) - lengths_N)

    def _make_block(self, number: int) -> NDArray[np.int64]:
        return permutation(self.rows_per_epoch, *self._key, "rows", number)
