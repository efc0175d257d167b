from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.ops.blockwise import decode, encode, levels

HALF_CELL = {True: 0.9 / 64 / 2, False: 0.9 / 128 / 2}
"""Of the highest decade, the widest cells there are."""


def naive(value_N: Tensor, block: int, *, signed: bool) -> Tensor:
    """Each value alone: the nearest of all levels, but no level 0 above 0 where values have no sign."""
    found: list[Tensor] = []
    for start in range(0, value_N.numel(), block):
        part_B = value_N[start : start + block]
        scale = part_B.abs().max()
        for value in part_B:
            choice_L = levels(signed=signed) if signed or value == 0 else levels(signed=signed)[1:]
            share = value / scale if scale > 0 else value
            found.append(choice_L[(choice_L - share).abs().argmin()] * scale)
    return torch.stack(found)


def values(count: int, *, signed: bool, spread: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    value_N = torch.randn(count, generator=generator)
    value_N = value_N * torch.exp(spread * torch.randn(count, generator=generator))
    value_N[::7] = 0
    return value_N if signed else value_N.square()


@given(
    count=st.integers(1, 70),
    block=st.sampled_from([1, 16, 64]),
    signed=st.booleans(),
    spread=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 9),
)
def test_every_value_gets_the_nearest_level(
    count: int, block: int, signed: bool, spread: float, seed: int
) -> None:
    value_N = values(count, signed=signed, spread=spread, seed=seed)
    coded = encode(value_N, block, signed=signed)
    actual_N = decode(coded, block, signed=signed)
    assert coded.code_C.dtype == torch.uint8
    assert coded.scale_K.shape == (-(-count // block),)
    expected_N = naive(value_N, block, signed=signed)
    scale_N = coded.scale_K.repeat_interleave(block)[:count]
    # A value in the middle of two levels may go either way.
    far_N = (actual_N - expected_N).abs() > 1e-6 * scale_N
    assert (
        ((actual_N - value_N).abs() - (expected_N - value_N).abs())[far_N]
        .abs()
        .le(1e-6 * scale_N[far_N])
        .all()
    )
    assert ((actual_N - value_N).abs() <= (HALF_CELL[signed] + 1e-6) * scale_N).all()
    assert ((actual_N == 0) == (value_N == 0)).all() or signed


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_codes_of_one_byte_in_rising_order(signed: bool) -> None:
    level_L = levels(signed=signed)
    assert level_L.shape == (256,)
    assert (level_L.diff() > 0).all()
    assert (level_L[-1], level_L.abs().min()) == (1, 0)
    assert torch.equal(decode(encode(level_L, 256, signed=signed), 256, signed=signed), level_L)


def test_zeros_are_kept_and_need_no_scale() -> None:
    coded = encode(torch.zeros(10), 4, signed=True)
    assert not coded.scale_K.any()
    assert not decode(coded, 4, signed=True).any()
