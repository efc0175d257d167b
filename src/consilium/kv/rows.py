"""What a cached row is made of: its values as they are, or a latent in 8 bits.

Legend: C values of a row, X elements of the storage that hold them, Z rank of the latent, R width of the
rotated key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Protocol, final

import torch
from torch import Tensor

from consilium.config.attention import GQA, MLA
from consilium.errors import ConsiliumError

CacheFormat = Literal["model", "int8"]
"""The dtype of the model, or latents in 8 bits."""
_HALF: Final = 2
"""Bytes of a value in bfloat16."""


class Rows(Protocol):
    """How rows are stored. The same values give the same bits, whoever is beside them."""

    @property
    def width(self) -> int:
        """X."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the storage."""
        ...

    def stored(self, rows: Tensor) -> Tensor:
        """What is kept [..., X] of rows [..., C]."""
        ...

    def read(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [..., C] again."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Plain:
    """Values in a floating-point dtype: X is C."""

    width: int
    dtype: torch.dtype

    def stored(self, rows: Tensor) -> Tensor:
        return rows.to(self.dtype)

    def read(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        return stored.to(dtype)


@final
@dataclass(frozen=True, slots=True)
class EightBits:
    """Z integers of the latent, the rotated key in bfloat16, and the integers' scale in bfloat16, in bytes.

    The scale takes the largest value of a token's latent to 127 before it is rounded. Rotated keys stay: they
    are few, and their angles carry positions. X = Z + 2 R + 2.
    """

    rank: int
    rotated: int

    @property
    def width(self) -> int:
        return self.rank + _HALF * self.rotated + _HALF

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8

    def stored(self, rows: Tensor) -> Tensor:
        latent, key = rows.float().split((self.rank, self.rotated), -1)
        scale = (latent.abs().amax(-1, keepdim=True) / 127).bfloat16()
        shares = torch.where(scale == 0, 0.0, latent / scale.float())
        integers = shares.round().clamp(-127, 127).to(torch.int8)
        return torch.cat((integers, key.bfloat16().view(torch.int8), scale.view(torch.int8)), -1)

    def read(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        integers, key, scale = stored.split((self.rank, _HALF * self.rotated, _HALF), -1)
        latent = integers.float() * scale.contiguous().view(torch.bfloat16).float()
        return torch.cat((latent.to(dtype), key.contiguous().view(torch.bfloat16).to(dtype)), -1)


def rows_of(attention: GQA | MLA, form: CacheFormat, dtype: torch.dtype) -> Rows:
    """Raises ConsiliumError for a format that ``attention`` has no use for."""
    match form, attention:
        case "model", _:
            return Plain(attention.cache_width, dtype)
        case "int8", MLA():
            return EightBits(attention.kv_rank, attention.rope_dim)
        case "int8", GQA():
            raise ConsiliumError(
                "a cache in int8 is for latent attention, and this model caches keys and values;"
                " leave --cache out."
            )
