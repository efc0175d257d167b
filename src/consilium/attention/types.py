"""What a pass tells every attention layer. Built once a pass, shared by all layers.

Legend: B sequences, S new tokens, L keys visible to the pass (cached and new), D hidden, H heads, R rotated
dimensions / 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from consilium.ops.documents import Documents

LatentPath = Literal["auto", "expanded", "absorbed"]


@dataclass(frozen=True, slots=True)
class Peaks:
    """Asks latent attention for the largest logit of each head, exact where it exceeds ``above``."""

    above: float
    valid_BS: Tensor | None
    """bool; None where every token is."""

    def part(self, begin: int, end: int) -> Peaks:
        return Peaks(self.above, None if self.valid_BS is None else self.valid_BS[begin:end])


@dataclass(frozen=True, slots=True)
class Attended:
    y_BSD: Tensor
    largest_H: Tensor | None = None
    """float32, as ``ops.peaks`` says; None where nobody asked, and of attention that is not latent."""


@dataclass(frozen=True, slots=True)
class Context:
    position_BS: Tensor
    """int64 position inside the token's own document; also the cache slot it is written to."""
    cos_BSR: Tensor
    """float32 cosines, YaRN's rotation scale included."""
    sin_BSR: Tensor
    documents: Documents | None
    """Without a cache: where documents begin in the rows; None where every row is one."""
    seen_BSL: Tensor | None
    """With a cache: bool, True where a query sees a slot; None is plain causal attention over new tokens."""
    latent_path: LatentPath = "auto"
    """How latent attention computes: by cost, or as told."""
    peaks: Peaks | None = None
    """Without a cache."""

    @property
    def keys(self) -> int:
        """L: how many keys the pass sees."""
        return self.position_BS.shape[1] if self.seen_BSL is None else self.seen_BSL.shape[-1]

    def part(self, begin: int, end: int) -> Context:
        """The context of some consecutive rows, without a cache."""
        assert self.seen_BSL is None, "a cache holds the rows of a whole pass"
        documents = None if self.documents is None else self.documents.part(begin, end)
        peaks = None if self.peaks is None else self.peaks.part(begin, end)
        position_BS, cos_BSR, sin_BSR = (
            of_B[begin:end] for of_B in (self.position_BS, self.cos_BSR, self.sin_BSR)
        )
        return Context(position_BS, cos_BSR, sin_BSR, documents, None, self.latent_path, peaks)
