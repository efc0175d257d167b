"""What a dtype of 16 bits cannot hold: weights beyond its range, and gates next to zero.

Legend: E experts, D hidden size.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from consilium.errors import ConsiliumError

_STEPS: Final = 64
"""Of a dtype next to zero, in the size of a gate: rounding is then as fine as bfloat16's."""


def rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return ``values`` as our tensor ``name`` is written. Raises ConsiliumError where they do not fit."""
    found = values.to(dtype)
    if not all(math.isfinite(float(end)) for end in found.aminmax()):
        kind = str(dtype).removeprefix("torch.")
        raise ConsiliumError(
            f"upcycle: {name} goes beyond {torch.finfo(dtype).max:g}, where {kind} ends; convert the source"
            " first: consilium convert DENSE NEW --dtype bfloat16."
        )
    return found


def raised(rows_ED: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gate rows, all of them larger where ``dtype`` would round them to a handful of values.

    float16 has steps of 6e-8 next to zero, of which a row of a thousand small values is one or none: experts
    would tie, and the first ones get all tokens.
    """
    kind = torch.finfo(dtype)
    size = float(rows_ED.square().mean().sqrt())
    return rows_ED * max(1.0, _STEPS * kind.smallest_normal * kind.eps / size) if size else rows_ED
