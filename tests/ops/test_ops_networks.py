"""Expert networks by the native kernels are those of the loop over experts, whoever is idle or busy.

Legend: R rows, E experts, D hidden size, F width.
"""

from __future__ import annotations

import pytest
import torch

from consilium.config.feed_forward import Activation, matrices
from consilium.ops import grouped
from consilium.ops.grouped import observed_feed_forward, stacked_feed_forward
from consilium.ops.native import operators
from consilium.ops.native.compile import Tier
from consilium.ops.native.library import MANY
from consilium.ops.weights import PACKINGS, DenseStack, PackedStack, Stack, packed
from kernels import HERE, kernels_of, round_activations

COUNTS = [[0, 0, 1, 0], [3, 1, 0, 2], [40, 0, 17, 63], [0, 100, 0, 0], [16, 16, 32, 33]]
FORMATS = ("bfloat16", *PACKINGS)
D, F = 72, 40


def stacks(kind: str, activation: Activation) -> tuple[Stack, Stack]:
    generator = torch.Generator().manual_seed(0)
    up_EGD = torch.randn(4, (matrices(activation) - 1) * F, D, generator=generator) / D**0.5
    down_EDF = torch.randn(4, D, F, generator=generator) / F**0.5
    match kind:
        case "bfloat16":
            return DenseStack(up_EGD.bfloat16()), DenseStack(down_EDF.bfloat16())
        case _:
            form = next(packing for packing in PACKINGS if packing == kind)
            return PackedStack(*packed(up_EGD, form), D), PackedStack(*packed(down_EDF, form), F)


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("counts_E", COUNTS, ids=str)
def test_kernels_give_what_the_loop_gives(
    tier: Tier, kind: str, counts_E: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kernels_of(tier)
    up, down = stacks(kind, "swiglu")
    x_RD = torch.randn(sum(counts_E), D, generator=torch.Generator().manual_seed(1)).bfloat16()
    few = sum(counts_E) < MANY
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        exact_RD = observed_feed_forward(x_RD.float(), counts_E, up, down, "swiglu")[1]
        if few or tier in ("avx512", "avx512bf16"):  # which rounds those of prompts too
            round_activations(patch)
        right_RD = observed_feed_forward(x_RD.float(), counts_E, up, down, "swiglu")[1]
        monkeypatch.setattr(operators, "kernels", lambda: found)
        y_RD = stacked_feed_forward(x_RD, counts_E, up, down, "swiglu")
    assert y_RD.dtype == torch.bfloat16
    assert (y_RD - right_RD).norm() < 1e-2 * right_RD.norm()
    assert (y_RD - exact_RD).norm() < 2e-2 * exact_RD.norm(), "three products, each within a hundredth"


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu", "squared_relu"])
def test_every_activation(activation: Activation, monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels_of(HERE[-1])
    up, down = stacks("bfloat16", activation)
    x_RD = torch.randn(50, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    counts_E = [20, 0, 30, 0]
    with torch.inference_mode():
        right_RD = observed_feed_forward(x_RD.float(), counts_E, up, down, activation)[1]
        monkeypatch.setattr(operators, "kernels", lambda: found)
        y_RD = stacked_feed_forward(x_RD, counts_E, up, down, activation)
    assert (y_RD - right_RD).norm() < 1e-2 * right_RD.norm()


def test_what_kernels_are_not_for_is_computed_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autograd, by a backend that was asked for, of no rows, of float32 masters and any rows."""

    def asked(*_: object) -> None:
        raise AssertionError("kernels were asked for")

    found = kernels_of(HERE[-1])
    monkeypatch.setattr(operators, "kernels", lambda: found)
    monkeypatch.setattr(grouped, "networks", asked)
    up, down = stacks("bfloat16", "swiglu")
    x_RD, counts_E = torch.ones(6, D).bfloat16(), [6, 0, 0, 0]
    assert stacked_feed_forward(x_RD, counts_E, up, down, "swiglu").shape == (6, D)
    with torch.inference_mode():
        stacked_feed_forward(x_RD, counts_E, up, down, "swiglu", "loop")
        stacked_feed_forward(x_RD[:0], [0] * 4, up, down, "swiglu")
        wide = DenseStack(torch.ones(4, 2 * F, D)), DenseStack(torch.ones(4, D, F))
        stacked_feed_forward(x_RD.float(), counts_E, *wide, "swiglu")
        stacked_feed_forward(x_RD, counts_E, *wide, "swiglu")
