"""The contract between attention and a cache: one row of C values a token and layer.

Legend: B sequences, S new tokens, L slots in use, C cached values a token
(GQA: keys then values of every kv head; MLA: normalised latent then rotated shared key).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class LayerCache(Protocol):
    """One layer's slots. A token's slot is its position, so a row may be rewritten but never moves."""

    def extend(self, position_BS: Tensor, new_BSC: Tensor, keys: int) -> Tensor:
        """Write the new rows at their slots and return rows [B, L, C], L = keys, in the dtype of the new.

        ``keys`` is one more than the largest position of the pass. It is an argument because whoever builds
        the pass knows it, while reading it off ``position_BS`` would wait for the device once a layer.
        """
        ...


class Cache(Protocol):
    """All layers of a batch. Created by the engine, passed down as an argument, never held by a module."""

    def layer(self, index: int) -> LayerCache: ...
