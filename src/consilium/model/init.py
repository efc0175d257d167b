"""Initialisation: matrices from one generator in the order of the module tree, norms 1, biases 0."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from consilium.config.model import FanIn, Init, Normal

NOISE = "router.noise.weight"
ZERO_BESIDE_NOISE = ("noise.weight", "projection.weight", "primary.weight", "primary_noise.weight")
"""With learned noise a linear gate is zero at the start too: loads are equal (Shazeer 2017, appendix A)."""


@torch.no_grad()
def initialise(model: nn.Module, init: Init, seed: int) -> None:
    """Draw all weights from ``seed``. Deterministic for a given module tree."""
    generator = torch.Generator().manual_seed(seed)
    zero = _zero_at_start(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        elif name in zero:
            parameter.zero_()
        else:
            _draw(parameter, init, generator)


def _zero_at_start(model: nn.Module) -> set[str]:
    noises = [name for name, _ in model.named_parameters() if name.endswith(NOISE)]
    return {name.removesuffix("noise.weight") + part for name in noises for part in ZERO_BESIDE_NOISE}


def _draw(parameter: Tensor, init: Init, generator: torch.Generator) -> None:
    match init:
        case Normal(std=std):
            parameter.normal_(0.0, std, generator=generator)
        case FanIn(scale=scale):
            std = (scale / parameter.shape[-1]) ** 0.5
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
