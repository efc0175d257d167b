"""Products of random shapes in every format, whose whole numbers no kernel rounds: a wrong place shows."""

from __future__ import annotations

from random import Random

import pytest
import torch

from consilium.ops.native.compile import Tier
from consilium.ops.weights import PACKINGS, Dense, Matrix, Packed, packed
from kernels import HERE, kernels_of, whole_numbers

FORMATS = ("float32", "bfloat16", *PACKINGS)


def matrix_of(form: str, outputs: int, inputs: int, seed: int) -> Matrix:
    most = 7 if form in {"int4", "uint4", "fp8"} else 127
    weight_OI = whole_numbers(outputs, inputs, most=most, seed=seed) / 4
    match form:
        case "int8":
            return Packed(*packed(weight_OI, "int8"), inputs)
        case "int4" | "uint4":
            weight_OI[:, ::32], weight_OI[:, 1::32] = -2.0, 1.75
            return Packed(*packed(weight_OI, form), inputs)
        case "fp8":
            weight_OI[:, ::128] = 1.75
            return Packed(*packed(weight_OI, "fp8"), inputs)
        case _:
            return Dense(weight_OI.to(getattr(torch, form)))


def check(tier: Tier, shapes: int) -> None:
    kernels, random = kernels_of(tier), Random(shapes)
    for number in range(shapes):
        form, many = random.choice(FORMATS), random.random() < 0.5
        rows, outputs, inputs = random.randint(1, 80), random.randint(1, 200), random.randint(1, 1100)
        matrix = matrix_of(form, outputs, inputs, number)
        most = 127 if form in {"int8", "int4", "uint4"} else 100
        x_BI = whole_numbers(rows, inputs, most=most, seed=number + 1)
        bias_O = torch.arange(outputs).float() if random.random() < 0.5 else None
        described = matrix.native(bias_O)
        assert described is not None
        found = kernels.product(described, x_BI, many=many)
        right = x_BI.double() @ matrix.wide(torch.float64).T + (0.0 if bias_O is None else bias_O)
        told = f"{form}, {rows} rows of {inputs} to {outputs}, many {many}"
        assert (found - right).norm() <= 1e-6 * right.norm(), told


@pytest.mark.parametrize("tier", HERE)
def test_random_shapes(tier: Tier) -> None:
    check(tier, 50)


@pytest.mark.slow
@pytest.mark.parametrize("tier", HERE)
def test_ten_thousand_random_shapes(tier: Tier) -> None:
    """Of all tiers together."""
    check(tier, -(-10_000 // len(HERE)))
