"""A preallocated cache: every sequence of a batch owns ``capacity`` slots in every layer.

One class serves grouped-query and latent attention, since the contract is rows of C values and only
attention knows what they hold.

Legend: B sequences, N slots a sequence, S new tokens, L slots in use, C cached values a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from consilium.errors import ConsiliumError
from consilium.kv.types import View


@final
class DenseLayer:
    """The slots of one layer, [B, N, C].

    Invariant: slot j of a sequence holds the row of its token j, for every j below its length. Slots from its
    length on hold zeros or what padding wrote there. They are finite, because a masked weight of 0 times NaN
    is NaN; they are never seen, because no query looks past its own position; and the token that comes to own
    such a slot writes it before it is read. So right padding simply counts on the positions of its row.
    """

    def __init__(self, rows_BNC: Tensor) -> None:
        self._rows_BNC = rows_BNC
        self._sequence_B1 = torch.arange(rows_BNC.shape[0], device=rows_BNC.device)[:, None]

    def write(self, new_BSC: Tensor, slots_BS: Tensor) -> None:
        """Write [B, S, C] at slots [B, S]; a slot beyond the capacity is refused by ``view``, before."""
        self._rows_BNC[self._sequence_B1, slots_BS] = new_BSC.detach().to(self._rows_BNC.dtype)

    def view(self, slots: int) -> View:
        """Return the first ``slots`` slots of every sequence.

        Raises ConsiliumError when they exceed the capacity.
        """
        capacity = self._rows_BNC.shape[1]
        if slots > capacity:
            raise ConsiliumError(
                f"cache: a sequence needs {slots} slots but the cache was allocated with {capacity};"
                " ask for fewer new tokens or allocate a larger capacity."
            )
        return View(self._rows_BNC, None, slots)


@final
class DenseCache:
    """All layers of a batch of sequences, allocated at once. Meets ``kv.types.Cache``."""

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        capacity: int,
        width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._layers = tuple(
            torch.zeros(batch, capacity, width, dtype=dtype, device=device) for _ in range(layers)
        )

    def layer(self, index: int, sequences: slice = slice(None)) -> DenseLayer:
        """The slots of one layer, of all sequences or of some."""
        return DenseLayer(self._layers[index][sequences])

    @property
    def batch(self) -> int:
        return self._layers[0].shape[0]

    @property
    def capacity(self) -> int:
        return self._layers[0].shape[1]

    def move(self, source: int, target: int) -> None:
        """Copy the rows of one sequence over those of another."""
        for rows_BNC in self._layers:
            rows_BNC[target] = rows_BNC[source]

    def take(self, smaller: DenseCache) -> None:
        """Copy all that ``smaller`` holds to the same sequences and slots."""
        for rows_BNC, held_BNC in zip(self._layers, smaller._layers, strict=True):
            rows_BNC[: smaller.batch, : smaller.capacity] = held_BNC

    @property
    def bytes(self) -> int:
        """Memory held: layers * batch * capacity * width * bytes a value."""
        return sum(rows_BNC.nbytes for rows_BNC in self._layers)


@final
@dataclass(frozen=True, slots=True)
class DensePart:
    """Some sequences of a dense cache, for a pass over these alone. Meets ``kv.types.Cache``."""

    cache: DenseCache
    sequences: slice

    def layer(self, index: int) -> DenseLayer:
        """The slots of one layer."""
        return self.cache.layer(index, self.sequences)
