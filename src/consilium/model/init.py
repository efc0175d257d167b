"""Initialisation: matrices from one generator in the order of the module tree, norms 1, biases 0."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from consilium.config.model import FanIn, Init, Normal

ZERO_AT_START = ("router.noise.weight",)
"""Learned noise starts at zero so that loads start equal (Shazeer 2017, appendix A)."""


@torch.no_grad()
def initialise(model: nn.Module, init: Init, seed: int) -> None:
    """Draw all weights from ``seed``. Deterministic for a given module tree."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        elif name.endswith(ZERO_AT_START):
            parameter.zero_()
        else:
            _draw(parameter, init, generator)


def _draw(parameter: Tensor, init: Init, generator: torch.Generator) -> None:
    match init:
        case Normal(std=std):
            parameter.normal_(0.0, std, generator=generator)
        case FanIn(scale=scale):
            std = (scale / parameter.shape[-1]) ** 0.5
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
