"""What bias rules keep from step to step, as a checkpoint holds it beside the optimizer's moments.

Weights do without: a bias chooses alike whatever moved it, and other programs would not know these tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from consilium.model.decoder import Decoder

_PREFIX: Final = "balance/"


def controls(model: Decoder) -> dict[str, Tensor]:
    """The tensors by layer and name; most rules keep none."""
    return {
        f"{_PREFIX}{layer}/{name}": value
        for layer, moe in model.moe_modules().items()
        for name, value in moe.balance.controls.items()
    }


def restore_controls(model: Decoder, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of ``controls``; returns what of ``saved`` is of others."""
    for name, value in controls(model).items():
        value.copy_(saved[name])
    return {name: value for name, value in saved.items() if not name.startswith(_PREFIX)}
