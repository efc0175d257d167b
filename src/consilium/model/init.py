"""Initialisation: each matrix from a stream of its own, norms 1, biases 0.

A stream is a function of the seed, the tensor's name and, in a stack, the expert: whoever holds some of the
layers or experts draws the same values for them as whoever holds all, in whatever order.

Legend: O outputs, I inputs of one matrix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from consilium.config.model import FanIn, Init, Normal
from consilium.moe.experts import Experts
from consilium.parallel.part import Part, whole

NOISE = "router.noise.weight"
ZERO_BESIDE_NOISE = ("noise.weight", "projection.weight", "primary.weight", "primary_noise.weight")
"""With learned noise a linear gate is zero at the start too: loads are equal (Shazeer 2017, appendix A)."""


@torch.no_grad()
def initialise(model: nn.Module, init: Init, seed: int, part_of: Callable[[Tensor], Part] = whole) -> None:
    """Write every parameter of ``model``, which may be of any dtype, on any device and uninitialised.

    Values are drawn in float32 on the CPU and rounded, so that a seed means the same model everywhere. Of a
    model over several processes each writes its part, and of a stack draws its own experts alone.
    """
    zero = _zero_at_start(model)
    first = first_experts(model)
    for name, parameter in model.named_parameters():
        part = part_of(parameter)
        if parameter.ndim < 2:
            part.here.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        elif name in zero:
            part.here.zero_()
        elif parameter.ndim == 2:
            rows = slice(part.rows.start, part.rows.stop)
            part.here.copy_(_drawn(parameter.shape, init, _stream(f"{seed}/{name}"))[rows])
        else:
            for matrix, row in zip(part.here, part.rows, strict=True):
                stream = _stream(f"{seed}/{name}/{first.get(name, 0) + row}")
                matrix.copy_(_drawn(matrix.shape, init, stream))


def first_experts(model: nn.Module) -> dict[str, int]:
    """By the names of stacks: which expert of the layer their first one is, where others live elsewhere."""
    return {
        f"{name}.{stack}": module.owned.start
        for name, module in model.named_modules()
        if isinstance(module, Experts)
        for stack, _ in module.named_parameters()
    }


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
