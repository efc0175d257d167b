"""Values in 8 bits: a code each, and a scale for each block (Dettmers et al., 2110.02861 section 2).

Legend: L codes, N values, C codes of N values, K blocks of B values each, the last of which may be shorter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def levels(*, signed: bool) -> Tensor:
    """What the 256 codes stand for, rising: float32 [L] from -1 (or 0) to 1.

    Dynamic tree quantisation: each decade from 1e-6 up to 1 has twice the levels of the one below, so that
    large values are close to a level and values a million times smaller are not zero yet.
    """
    decades = 7
    values = [0.0, 1.0]
    for decade in range(decades):
        cells = 2 ** (decade if signed else decade + 1)
        centres = [0.1 + 0.9 * (cell + 0.5) / cells for cell in range(cells)]
        positive = [10.0 ** (decade + 1 - decades) * centre for centre in centres]
        values += positive + [-value for value in positive if signed]
    assert len(values) == 256
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def _boundaries(*, signed: bool) -> Tensor:
    level_L = levels(signed=signed)
    return (level_L[1:] + level_L[:-1]) / 2


@dataclass(frozen=True, slots=True)
class Coded:
    """Tensors of a quantised vector; whoever holds them decides what they are called."""

    code_C: Tensor
    """uint8."""
    scale_K: Tensor
    """float32: the largest absolute value of each block."""


def encode(value_N: Tensor, block: int, *, signed: bool) -> Coded:
    """Quantise a float32 vector to the nearest levels times the largest absolute value of its block.

    Unsigned, nothing above 0 becomes 0: who divides by its root would else divide by 0.
    """
    blocks_KB = _blocks(value_N, block)
    scale_K = blocks_KB.abs().amax(1)
    share_KB = blocks_KB / scale_K.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    code_KB = torch.bucketize(share_KB, _boundaries(signed=signed).to(value_N.device), out_int32=True)
    if not signed:
        code_KB = torch.where(share_KB > 0, code_KB.clamp(min=1), code_KB)
    return Coded(code_KB.to(torch.uint8).flatten()[: value_N.numel()], scale_K)


def decode(coded: Coded, block: int, *, signed: bool) -> Tensor:
    """Float32 [N] of what ``encode`` made."""
    share_N = levels(signed=signed).to(coded.code_C.device)[coded.code_C.int()]
    return (_blocks(share_N, block) * coded.scale_K[:, None]).flatten()[: share_N.numel()]


def _blocks(value_N: Tensor, block: int) -> Tensor:
    return F.pad(value_N, (0, -value_N.numel() % block)).view(-1, block)
