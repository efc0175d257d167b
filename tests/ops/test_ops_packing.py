"""Weights in 8 and 4 bits: the nearest integers by groups, and kernels that multiply with just those values.

Legend: O outputs, I inputs, G groups, E experts, B rows.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.ops.native import operators
from consilium.ops.native.compile import Tier
from consilium.ops.weights import (
    FLOAT8_GROUP,
    GROUP,
    PACKINGS,
    Packed,
    PackedStack,
    Packing,
    halves_of,
    packed,
    unpacked,
)
from kernels import HERE, kernels_of, rounded, whole_numbers

INTEGERS: tuple[Packing, ...] = ("int8", "int4", "uint4")


def unpacked_naive(integers: torch.Tensor, scales: torch.Tensor, columns: int) -> list[list[float]]:
    """One value after the other, as the formats are described."""
    rows, size = [], FLOAT8_GROUP if integers.is_floating_point() else GROUP
    groups = -(-columns // size)
    for o in range(len(integers)):
        row = []
        for i in range(columns):
            group, place = divmod(i, size)
            if integers.is_floating_point():
                value = float(integers[o, i])
            elif integers.dtype == torch.int8:
                value = int(integers[o, i])
            else:
                byte = int(integers[o, group * 16 + place % 16])
                value = byte & 15 if place < 16 else byte >> 4
                value -= 0 if scales.shape[1] > groups else 8
            lowest = scales[o, groups + group].float() if scales.shape[1] > groups else 0.0
            row.append(float(value * scales[o, group].float() + lowest))
        rows.append(row)
    return rows


@pytest.mark.parametrize("packing", PACKINGS)
@given(outputs=st.integers(1, 5), inputs=st.integers(1, 100), seed=st.integers(0, 99))
def test_values_are_those_of_the_format(packing: Packing, outputs: int, inputs: int, seed: int) -> None:
    weight_OI = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    integers, scales = packed(weight_OI, packing)
    found = unpacked(integers, scales, inputs)
    assert found.tolist() == unpacked_naive(integers, scales, inputs)


@given(inputs=st.integers(1, 300), size=st.sampled_from([1e-30, 1.0, 1e30]), seed=st.integers(0, 99))
def test_floats_in_8_bits_are_the_nearest(inputs: int, size: float, seed: int) -> None:
    """Within a sixteenth of the value, or half the smallest step below the smallest normal one."""
    weight_OI = size * torch.randn(3, inputs, generator=torch.Generator().manual_seed(seed))
    codes, scales = packed(weight_OI, "fp8")
    error_OI = (unpacked(codes, scales, inputs) - weight_OI).abs()
    least_OI = scales.repeat_interleave(FLOAT8_GROUP, -1)[:, :inputs] * 2.0**-10
    assert (error_OI <= 1.0001 * torch.maximum(weight_OI.abs() / 16, least_OI)).all()


@pytest.mark.parametrize("packing", INTEGERS)
@given(inputs=st.integers(1, 100), size=st.sampled_from([1e-2, 1.0, 1e4]), seed=st.integers(0, 99))
def test_integers_are_the_nearest(packing: Packing, inputs: int, size: float, seed: int) -> None:
    """Within half a step and what float16 rounds off a small scale; int4 ends a step earlier on one side."""
    weight_OI = size * torch.randn(3, inputs, generator=torch.Generator().manual_seed(seed))
    integers, scales = packed(weight_OI, packing)
    groups = -(-inputs // GROUP)
    step_OI = scales[:, :groups].float().abs().repeat_interleave(GROUP, -1)[:, :inputs]
    error_OI = (unpacked(integers, scales, inputs) - weight_OI).abs()
    rounded = 127 * 2.0**-25 if packing != "uint4" else scales.float().abs().amax() * 2.0**-11
    assert (error_OI <= step_OI * (1.01 if packing == "int4" else 0.5625) + rounded).all()
    if packing == "int4":
        inside = weight_OI.abs() < 7 * step_OI
        assert (error_OI[inside] <= 0.501 * step_OI[inside]).all()


@pytest.mark.parametrize("packing", PACKINGS)
@given(inputs=st.integers(1, 70), seed=st.integers(0, 99))
def test_packing_what_was_packed_changes_nothing(packing: Packing, inputs: int, seed: int) -> None:
    weight_OI = torch.randn(4, inputs, generator=torch.Generator().manual_seed(seed))
    once = unpacked(*packed(weight_OI, packing), inputs)
    assert torch.equal(unpacked(*packed(once, packing), inputs), once)


@pytest.mark.parametrize("packing", PACKINGS)
def test_zeros_and_extremes_stay_finite(packing: Packing) -> None:
    weight_OI = torch.zeros(4, 64)
    weight_OI[1, 0], weight_OI[2, 5], weight_OI[3, :32] = 1e-30, 3e4, torch.linspace(-1e5, 1e5, 32)
    found = unpacked(*packed(weight_OI, packing), 64)
    assert torch.isfinite(found).all()
    assert (found[0] == 0).all()
    assert found[2, 5] == pytest.approx(3e4, rel=1e-3)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_stack_is_its_matrices(packing: Packing) -> None:
    weight_EOI = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    stack = PackedStack(*packed(weight_EOI, packing), 40)
    assert stack.shape == (3, 5, 40)
    for matrix, weight_OI in zip(stack.matrices(), weight_EOI, strict=True):
        assert torch.equal(
            matrix.wide(torch.float32), Packed(*packed(weight_OI, packing), 40).wide(torch.float32)
        )


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 63, 33), (9, 64, 1000), (4, 6, 64)], ids=str)
def test_kernels_multiply_with_the_packed_values(
    tier: Tier, packing: Packing, shape: tuple[int, int, int]
) -> None:
    rows, outputs, inputs = shape
    generator = torch.Generator().manual_seed(inputs)
    x_BI = torch.randn(rows, inputs, generator=generator)
    bias_O = torch.randn(outputs, generator=generator)
    matrix = Packed(*packed(torch.randn(outputs, inputs, generator=generator), packing), inputs)
    described = matrix.native(bias_O)
    assert described is not None
    found = kernels_of(tier).product(described, x_BI)
    active_BI = x_BI if packing == "fp8" else rounded(x_BI)
    right = active_BI.double() @ matrix.wide(torch.float64).T + bias_O.double()
    assert (found - right).norm() <= 1e-6 * right.norm()
    wide = x_BI.double() @ matrix.wide(torch.float64).T + bias_O.double()
    assert (found - wide).norm() <= 1e-2 * wide.norm()


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("rows", [1, 4, 16, 17, 33, 64])
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (65, 64), (130, 288), (64, 1000), (7, 513)], ids=str)
def test_rows_of_a_prompt_are_multiplied_alike(
    tier: Tier, packing: Packing, rows: int, shape: tuple[int, int]
) -> None:
    """Activations and weights are whole numbers, of scales that are powers of two: nothing is rounded."""
    outputs, inputs = shape
    x_BI = whole_numbers(rows, inputs, most=127)
    weight_OI = whole_numbers(outputs, inputs, most=127 if packing == "int8" else 7, seed=1) / 4
    if packing == "fp8":
        weight_OI[:, ::FLOAT8_GROUP] = 1.75
    elif packing != "int8":
        weight_OI[:, ::GROUP], weight_OI[:, 1::GROUP] = -2.0, 1.75
    matrix = Packed(*packed(weight_OI, packing), inputs)
    assert torch.equal(matrix.wide(torch.float32), weight_OI)
    described = matrix.native()
    assert described is not None
    right = x_BI.double() @ weight_OI.double().T
    for many in (False, True):
        found = kernels_of(tier).product(described, x_BI, many=many)
        assert (found - right).norm() <= 1e-6 * right.norm()


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(tier: Tier, packing: Packing) -> None:
    generator = torch.Generator().manual_seed(0)
    x_BI = torch.randn(40, 200, generator=generator)
    matrix = Packed(*packed(torch.randn(90, 200, generator=generator), packing), 200)
    described = matrix.native()
    assert described is not None
    alone = torch.cat([kernels_of(tier).product(described, x_BI[b : b + 1]) for b in range(40)])
    for rows in (2, 5, 17, 40):
        assert torch.equal(kernels_of(tier).product(described, x_BI[:rows].contiguous()), alone[:rows])


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("packing", PACKINGS)
def test_extreme_activations_stay_finite_and_what_is_none_stays_none(tier: Tier, packing: Packing) -> None:
    matrix = Packed(*packed(torch.ones(5, 70), packing), 70)
    described = matrix.native()
    assert described is not None
    x_BI = torch.full((4, 70), 1e5)
    x_BI[1], x_BI[2, 40], x_BI[3] = 0.0, torch.nan, 1e-30
    found = kernels_of(tier).product(described, x_BI)
    assert found[:2].isfinite().all()
    assert (found[1] == 0).all()
    assert found[2].isnan().all()
    assert torch.allclose(found[3], torch.tensor(7e-29), rtol=1e-2)


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_kernels_know_every_float_in_8_bits(tier: Tier, rows: int) -> None:
    """Each alone in a row, its smallest ones too, behind a place that fills no vector."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)
    codes_OI = torch.zeros(len(codes), 147).to(torch.float8_e4m3fn)
    codes_OI[:, 131] = codes
    scales_OG = torch.tensor([3.0, 0.5]).expand(len(codes), 2).contiguous()
    described = Packed(codes_OI, scales_OG, 147).native()
    assert described is not None
    for many in (False, True):
        found = kernels_of(tier).product(described, torch.ones(rows, 147), many=many)
        assert torch.equal(found, (codes.float() / 2).expand(rows, -1))


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("packing", INTEGERS)
def test_extreme_integers_are_summed_exactly(tier: Tier, packing: Packing) -> None:
    """Against integers: scales of one and activations of whole numbers leave nothing to round."""
    generator = torch.Generator().manual_seed(0)
    low, high = (-127, 127) if packing == "int8" else (-8, 7)
    integers_OI = torch.where(torch.rand(8, 256, generator=generator) < 0.5, low, high)
    x_BI = whole_numbers(3, 256, most=127)
    stored = integers_OI.to(torch.int8)
    scales_OG = torch.ones(8, 8).half()
    if packing != "int8":
        stored = halves_of(integers_OI.add(8).to(torch.uint8).unflatten(-1, (-1, GROUP))).flatten(-2)
    if packing == "uint4":
        scales_OG = torch.cat((scales_OG, -8 * scales_OG), 1)
    matrix = Packed(stored, scales_OG, 256)
    described = matrix.native()
    assert described is not None
    found = kernels_of(tier).product(described, x_BI)
    assert torch.equal(found.long(), x_BI.long() @ integers_OI.long().T)


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels_of(HERE[-1])
    monkeypatch.setattr(operators, "kernels", lambda: found)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("rows", [(0,), (1,), (3, 5), (130,)], ids=str)
def test_packed_matrices_multiply_by_kernels_and_without_alike(
    packing: Packing, rows: tuple[int, ...], with_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = Packed(*packed(torch.randn(37, 50, generator=generator), packing), 50)
    x, bias_O = torch.randn(*rows, 50, generator=generator), torch.randn(37, generator=generator)
    with torch.no_grad():
        found = matrix.times(x, bias_O)
        monkeypatch.setattr(operators, "kernels", lambda: None)
        right = matrix.times(x, bias_O)
    assert found.shape == (*rows, 37)
    assert (found - right).norm() <= 1e-2 * right.norm()
    assert matrix.times(x.bfloat16(), bias_O).dtype == torch.bfloat16


def test_a_gradient_passes_a_packed_matrix(with_kernels: None) -> None:
    matrix = Packed(*packed(torch.randn(6, 40), "int8"), 40)
    x = torch.randn(3, 40, requires_grad=True)
    matrix.times(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, matrix.wide(torch.float32).sum(0).expand(3, -1), rtol=1e-5)
