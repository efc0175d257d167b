"""Rotary position embedding (2104.09864) and its YaRN interpolation (2309.00071) as DeepSeek uses it.

Legend: B sequences, S tokens, H heads, R pairs, P dimensions of a head, of which the first 2R are rotated.
"""

from __future__ import annotations

import functools
import math
from typing import Final

import torch
from torch import Tensor

from consilium.config.attention import Rope, Unscaled, Yarn

# Keeps the ramp finite when both correction dimensions round to the same pair.
_STEEPEST: Final = 1e-3


def frequencies(rope: Rope, dim: int) -> Tensor:
    """Radians a position [dim / 2], computed in float64 and rounded once to float32."""
    found_R = torch.tensor(_different(rope, dim // rope.repeats), dtype=torch.float32)
    return found_R.repeat_interleave(rope.repeats)


@functools.cache
def _different(rope: Rope, dim: int) -> tuple[float, ...]:
    """Numbers of float32: every pass asks for them."""
    plain_R = rope.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    match rope.scaling:
        case Unscaled():
            found_R = plain_R
        case Yarn() as yarn:
            ramp_R = _interpolated_share(yarn, rope.theta, dim)
            found_R = plain_R / yarn.factor * ramp_R + plain_R * (1 - ramp_R)
    return tuple(found_R.float().tolist())


def rotation_scale(rope: Rope) -> float:
    """What cosine and sine are multiplied with: 1 except under YaRN."""
    match rope.scaling:
        case Unscaled():
            return 1.0
        case Yarn() as yarn:
            return yarn.rotation_scale


def rotary_tables(rope: Rope, dim: int, position: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [*position, dim / 2], YaRN's rotation scale included.

    Angles are float64: in float32 position * frequency is off by 1e-2 radians near position 160,000.
    """
    angle = position.double()[..., None] * frequencies(rope, dim).to(position.device).double()
    scale = rotation_scale(rope)
    return (angle.cos() * scale).float(), (angle.sin() * scale).float()


def rotate(x_BSHP: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate every head's pairs in float32 and return the dtype of x; dimensions from 2R on stay as they are.

    ``interleaved`` pairs (2i, 2i + 1), as DeepSeek's checkpoints store them; otherwise (i, i + R).
    """
    shape, pair = ((-1, 2), -1) if interleaved else ((2, -1), -2)
    rotated = 2 * cos_BSR.shape[-1]
    a, b = x_BSHP[..., :rotated].float().unflatten(-1, shape).unbind(pair)
    cos, sin = cos_BSR.unsqueeze(-2), sin_BSR.unsqueeze(-2)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), pair).flatten(-2).to(x_BSHP.dtype)
    return turned if rotated == x_BSHP.shape[-1] else torch.cat((turned, x_BSHP[..., rotated:]), -1)


def rotate_naive(x_BSHP: Tensor, rope: Rope, position_BS: Tensor) -> Tensor:
    """The slow twin of ``rotary_tables`` and ``rotate``: one complex multiplication a pair, in float64."""
    x, pairs = x_BSHP.double(), round(x_BSHP.shape[-1] * rope.fraction) // 2
    columns: dict[int, Tensor] = {}
    for i, frequency in enumerate(frequencies(rope, 2 * pairs).tolist()):
        first, second = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + pairs)
        turn_BS1 = rotation_scale(rope) * torch.exp(1j * position_BS.double() * frequency)[..., None]
        turned_BSH = torch.complex(x[..., first], x[..., second]) * turn_BS1
        columns[first], columns[second] = turned_BSH.real, turned_BSH.imag
    return torch.stack([columns.get(i, x[..., i]) for i in range(x.shape[-1])], -1)


def _interpolated_share(yarn: Yarn, theta: float, dim: int) -> Tensor:
    """Share of interpolation a pair [R]: 0 for fast pairs (kept), 1 for slow ones (divided by the factor)."""
    low = max(math.floor(_pair_turning(yarn.beta_fast, yarn.original_length, theta, dim)), 0)
    high = min(math.ceil(_pair_turning(yarn.beta_slow, yarn.original_length, theta, dim)), dim - 1)
    pair_R = torch.arange(dim // 2, dtype=torch.float64)
    return ((pair_R - low) / max(high - low, _STEEPEST)).clamp(0, 1)


def _pair_turning(rotations: float, length: int, theta: float, dim: int) -> float:
    """The (fractional) pair that turns ``rotations`` times within ``length`` (2309.00071, section 3.2)."""
    return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))
