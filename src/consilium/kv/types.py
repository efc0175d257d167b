"""The contract between attention and a cache: one row of C values a token and layer.

Legend: B sequences, S new tokens, L slots in use, C cached values a token
(GQA: keys then values of every kv head; MLA: normalised latent then rotated shared key).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class LayerCache(Protocol):
    """One layer's slots. A token's slot is its position, so a row may be rewritten but never moves."""

    def extend(self, position_BS: Tensor, new_BSC: Tensor) -> Tensor:
        """Write the new rows at their slots and return rows [B, L, C] up to the longest sequence of the pass."""
        ...


class Cache(Protocol):
    """All layers of a batch. Created by the engine, passed down as an argument, never held by a module."""

    def layer(self, index: int) -> LayerCache: ...
