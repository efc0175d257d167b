"""Counting and hashing in integers: the same on every device, without a word to the host."""

from __future__ import annotations

import torch
from torch import Tensor


def occurrences(index: Tensor, size: int, where: Tensor | None = None) -> Tensor:
    """How often each number below ``size`` occurs in ``index`` (where the mask holds): int64 [size].

    Additions of integers, which no order of threads changes. ``torch.bincount`` is not deterministic on CUDA
    and stops the host to read the largest number, as indexing by a mask does to read its size.
    """
    ones = torch.ones_like(index) if where is None else where.to(index.dtype)
    return torch.zeros(size, dtype=index.dtype, device=index.device).index_add_(
        0, index.flatten(), ones.flatten()
    )


def scramble(value: Tensor) -> Tensor:
    """splitmix64's finaliser in wrapping int64 arithmetic; shifts are made logical by the masks."""
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return value ^ ((value >> 31) & 0x1FFFFFFFF)
