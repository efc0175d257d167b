"""Initialisation: each matrix from a stream of its own, norms 1, biases 0.

A stream is a function of the seed, the tensor's name and, in a stack, the expert: whoever holds some of the
layers or experts draws the same values for them as whoever holds all, in whatever order.

Legend: O outputs, I inputs of one matrix.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from consilium.config.model import FanIn, Init, Normal

NOISE = "router.noise.weight"
ZERO_BESIDE_NOISE = ("noise.weight", "projection.weight", "primary.weight", "primary_noise.weight")
"""With learned noise a linear gate is zero at the start too: loads are equal (Shazeer 2017, appendix A)."""


@torch.no_grad()
def initialise(model: nn.Module, init: Init, seed: int) -> None:
    """Write every parameter of ``model``, which may be of any dtype, on any device and uninitialised.

    Values are drawn in float32 on the CPU and rounded, so that a seed means the same model everywhere.
    """
    zero = _zero_at_start(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        elif name in zero:
            parameter.zero_()
        elif parameter.ndim == 2:
            parameter.copy_(_drawn(parameter.shape, init, _stream(f"{seed}/{name}")))
        else:
            for expert, matrix in enumerate(parameter):
                matrix.copy_(_drawn(matrix.shape, init, _stream(f"{seed}/{name}/{expert}")))


def _zero_at_start(model: nn.Module) -> set[str]:
    noises = [name for name, _ in model.named_parameters() if name.endswith(NOISE)]
    return {name.removesuffix("noise.weight") + part for name in noises for part in ZERO_BESIDE_NOISE}


def _stream(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _drawn(shape: torch.Size, init: Init, stream: torch.Generator) -> Tensor:
    matrix_OI = torch.empty(shape)
    match init:
        case Normal(std=std):
            return matrix_OI.normal_(0.0, std, generator=stream)
        case FanIn(scale=scale):
            std = (scale / shape[-1]) ** 0.5
            return nn.init.trunc_normal_(matrix_OI, std=std, a=-2 * std, b=2 * std, generator=stream)
