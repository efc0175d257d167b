"""What a dtype of 16 bits cannot hold: weights beyond its range, and gates next to zero.

Legend: E experts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from consilium.checkpoint.safetensors_io import refuse_overflow
from consilium.checkpoint.source import Source
from consilium.config.generation import GenerationDefaults
from consilium.config.model import Model

_STEPS: Final = 64
"""Of a dtype next to zero, in the size of a gate: rounding is then as fine as bfloat16's."""


@final
@dataclass(frozen=True, slots=True)
class Rounded:
    """A ``Source``: that of ``base`` whose values are those of its ``state``'s dtype, whoever asks.

    A folder may hold tensors in more bits than the result will, and be read in more.
    """

    config: Model
    generation: GenerationDefaults
    state: Mapping[str, Tensor]
    base: Source

    @staticmethod
    def of(base: Source) -> Rounded:
        return Rounded(base.config, base.generation, base.state, base)

    def fill(self, name: str, target: Tensor) -> None:
        """Write our tensor ``name`` into ``target``, in its dtype."""
        if target.dtype == self.state[name].dtype:
            self.base.fill(name, target)
        else:
            target.copy_(self.base.read(name))

    def fill_rows(self, name: str, target: Tensor, first: int) -> None:
        """The same of its rows from ``first`` on."""
        rows = torch.empty_like(target, dtype=self.state[name].dtype, device="cpu")
        self.base.fill_rows(name, rows, first)
        target.copy_(rows)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return our tensor ``name``, by default in the dtype that ``state`` says."""
        return self.base.read(name).to(dtype or self.state[name].dtype)


def rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return ``values`` as our tensor ``name`` is written. Raises ConsiliumError where they do not fit."""
    found = values.to(dtype)
    refuse_overflow(name, found)
    return found


def raised(rows_ED: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gate rows, all of them larger where ``dtype`` would round them to a handful of values.

    float16 has steps of 6e-8 next to zero, of which a row of a thousand small values is one or none: experts
    would tie, and the first ones get all tokens.
    """
    kind = torch.finfo(dtype)
    size = float(rows_ED.square().mean().sqrt())
    return rows_ED * max(1.0, _STEPS * kind.smallest_normal * kind.eps / size) if size else rows_ED
