"""The native kernels of every tier that this processor runs, compiled once for all tests of a run."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from consilium.ops.native.compile import VARIABLE, Built, Missing, Tier, built, tiers
from consilium.ops.native.library import Kernels, opened
from consilium.ops.weights import Packed

HERE = tiers()


@functools.cache
def compiled(tier: Tier) -> Built | Missing:
    folder = Path(tempfile.gettempdir()) / f"consilium-test-kernels-{Path.home().name}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, tier)
        return built(folder)


def kernels_of(tier: Tier) -> Kernels:
    """Skips where there is no compiler, which alone is no fault; a compiler that fails is one."""
    found = compiled(tier)
    if isinstance(found, Missing) and found.reason.startswith("there is no"):
        pytest.skip(found.reason)
    assert isinstance(found, Built), found
    return opened(found.path, tier)


def within(tier: Tier, weight_OI: Tensor) -> float:
    """The relative error that products of few rows with a dense matrix keep to."""
    return 1e-2 if tier == "amx" and weight_OI.dtype == torch.bfloat16 else 1e-6


def whole_numbers(rows: int, inputs: int, *, most: int, seed: int = 0) -> Tensor:
    """Activations that every kernel holds exactly, whatever it rounds them to: of each 32 one is ``most``."""
    generator = torch.Generator().manual_seed(seed)
    x_BI = torch.randint(-most, most + 1, (rows, inputs), generator=generator).float()
    x_BI[:, ::32] = most
    return x_BI


def rounded(x: Tensor) -> Tensor:
    """The slow twin of what kernels round activations to that packed weights multiply."""
    groups = F.pad(x.float(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    peak = groups.abs().amax(-1, keepdim=True)
    integers = torch.where(peak == 0, 0.0, groups * (127.0 / peak)).round()
    return (integers * (peak / 127.0)).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def round_activations(patch: pytest.MonkeyPatch) -> None:
    """Make packed integers multiply as kernels do; floats in 8 bits leave activations as they are."""
    times = Packed.times

    def multiplied(self: Packed, x: Tensor, bias_O: Tensor | None = None) -> Tensor:
        return times(self, x if self.codes_OC.is_floating_point() else rounded(x), bias_O)

    patch.setattr(Packed, "times", multiplied)
