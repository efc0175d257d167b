"""Cached rows in pages of one pool, which sequences take as they grow and may share.

One class serves grouped-query and latent attention, since the contract is rows of C values and only
attention knows what they hold.

Legend: B sequences, N pages, P slots a page, M pages of a sequence, S new tokens, L slots in use, C cached
values a token, X elements of the storage that hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from consilium.errors import ConsiliumError
from consilium.kv.rows import Rows
from consilium.kv.types import View


@final
@dataclass(frozen=True, slots=True)
class PagedLayer:
    """The slots of one layer, as far as some sequences own them. Meets ``kv.types.LayerCache``.

    Invariant: slot j of a sequence holds the row of its token j, for every j below its length. Slots from its
    length on hold zeros or what padding wrote there. They are finite, because a masked weight of 0 times NaN
    is NaN; they are never seen, because no query looks past its own position; and the token that comes to own
    such a slot writes it before it is read. So right padding simply counts on the positions of its row.
    """

    storage_NPX: Tensor
    rows: Rows
    table_BM: Tensor | None
    """int64; absent where sequence b owns page b alone."""

    def write(self, new_BSC: Tensor, slots_BS: Tensor) -> None:
        """Write [B, S, C] at slots [B, S]; a slot beyond the last page is refused by ``view``, before."""
        size = self.storage_NPX.shape[1]
        if self.table_BM is None:
            pages_BS = torch.arange(len(slots_BS), device=slots_BS.device)[:, None]
        else:
            pages_BS = self.table_BM.gather(1, slots_BS // size)
        self.storage_NPX[pages_BS, slots_BS % size] = self.rows.stored(new_BSC.detach())

    def view(self, slots: int) -> View:
        """Return the first ``slots`` slots of every sequence; ConsiliumError where its pages have fewer."""
        pages = 1 if self.table_BM is None else self.table_BM.shape[1]
        if slots > (capacity := pages * self.storage_NPX.shape[1]):
            raise ConsiliumError(
                f"cache: a sequence needs {slots} slots but the cache was allocated with {capacity};"
                " ask for fewer new tokens or allocate a larger capacity."
            )
        return View(self.storage_NPX, self.table_BM, self.rows, slots)


@final
@dataclass(frozen=True, slots=True)
class CachePart:
    """Some sequences in all layers, for a pass over these. Meets ``kv.types.Cache``."""

    layers: Sequence[Tensor]
    """Storage [N, P, X] of each."""
    rows: Rows
    table_BM: Tensor | None

    def layer(self, index: int) -> PagedLayer:
        return PagedLayer(self.layers[index], self.rows, self.table_BM)


@final
class PagedCache:
    """The pages of all layers: page n of every layer belongs to the same tokens.

    So none is free before its sequence ends, though layers with a window may have left its rows behind.
    """

    def __init__(
        self, *, layers: int, pages: int, page: int, rows: Rows, device: torch.device | str = "cpu"
    ) -> None:
        self._rows = rows
        self._layers = [
            torch.zeros(pages, page, rows.width, dtype=rows.dtype, device=device) for _ in range(layers)
        ]

    @property
    def pages(self) -> int:
        return self._layers[0].shape[0]

    @property
    def bytes(self) -> int:
        """Memory held: layers * pages * slots a page * bytes a row."""
        return sum(storage_NPX.nbytes for storage_NPX in self._layers)

    def part(self, table_BM: Tensor | None = None) -> CachePart:
        """What sequences see whose pages these are; without a table sequence b owns page b."""
        return CachePart(self._layers, self._rows, table_BM)

    def clear(self, pages: Sequence[int]) -> None:
        """Write zeros into pages that somebody is about to own."""
        for storage_NPX in self._layers:
            storage_NPX[list(pages)] = 0

    def grow(self, pages: int) -> None:
        """Add ``pages``; those that are there stay as they are. A layer at a time is held twice.

        What is in them has no meaning, and takes no memory, until they are cleared for their first owner.
        """
        for index, storage_NPX in enumerate(self._layers):
            more = storage_NPX.new_empty(pages, *storage_NPX.shape[1:])
            self._layers[index] = torch.cat((storage_NPX, more)) if len(storage_NPX) else more
