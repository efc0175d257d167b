"""The contract between attention and a cache: one row of C values a token and layer.

Legend: B sequences, S new tokens, L slots in use, N pages, P slots a page, M pages of a sequence, X elements
of the storage that hold a row of C cached values (GQA: keys then values of every kv head; MLA: latent then
rotated shared key).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol, final

import torch
from torch import Tensor

from consilium.kv.rows import Rows

TILE: Final = 512
"""Slots that are gathered from pages at once."""


@final
@dataclass(frozen=True, slots=True)
class View:
    """What attention reads of a layer. Slot j of sequence b is row j % P of page ``table_BM[b, j // P]``."""

    storage_NPX: Tensor
    table_BM: Tensor | None
    """int64; absent where sequence b owns page b alone."""
    rows: Rows
    slots: int
    """L: one more than the largest slot in use. Slots beyond a sequence's own length are finite, unseen."""

    def tiles(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The rows [B, at most TILE or P, C] of some pages of every sequence after others; in all L slots."""
        if self.table_BM is None:
            return (self.rows.read(self.storage_NPX[:, : self.slots], dtype),)
        size = self.storage_NPX.shape[1]
        pages = max(1, TILE // size)
        return tuple(
            self.rows.read(
                self.storage_NPX[self.table_BM[:, first : first + pages]].flatten(1, 2)[
                    :, : self.slots - first * size
                ],
                dtype,
            )
            for first in range(0, -(-self.slots // size), pages)
        )


class LayerCache(Protocol):
    """One layer's slots. A token's slot is its position, so a row may be rewritten but never moves."""

    def write(self, new_BSC: Tensor, slots_BS: Tensor) -> None:
        """Keep new rows, without gradient, in the dtype of the cache."""
        ...

    def view(self, slots: int) -> View:
        """Return the first ``slots`` slots of every sequence; ConsiliumError where there are fewer.

        The number is an argument because whoever builds the pass knows it, while reading it off the device
        would wait once a layer.
        """
        ...


class Cache(Protocol):
    """All layers of a batch. Created by the engine, passed down as an argument, never held by a module."""

    def layer(self, index: int) -> LayerCache: ...
