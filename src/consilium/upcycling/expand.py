"""More experts of a sparse model: each as often as asked, with a gate row that differs a little.

Legend: E experts of the result, N of the source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from consilium.checkpoint.source import Source
from consilium.config.generation import GenerationDefaults
from consilium.config.model import Model
from consilium.config.upcycling import Upcycling
from consilium.planner.upcycled import spread
from consilium.upcycling.source import stream

_BY_EXPERT: Final = re.compile(
    r"(?:layers|mtp)\.(\d+)\.(?:block\.)?moe\."
    r"(experts\.(?:up|down)|router\.(?:projection|noise)\.(?:output\.)?(?:weight|bias)|balance\.bias_E)"
)


@final
@dataclass(frozen=True, slots=True)
class Expanded:
    """A ``Source``: expert e of the result is expert e mod N of ``sparse``."""

    sparse: Source
    asked: Upcycling
    config: Model
    state: Mapping[str, Tensor]

    @property
    def generation(self) -> GenerationDefaults:
        return self.sparse.generation

    def fill(self, name: str, target: Tensor) -> None:
        """Write our tensor ``name`` into ``target``, in its dtype."""
        found = _BY_EXPERT.fullmatch(name)
        if found is None:
            self.sparse.fill(name, target)
            return
        values = self.sparse.read(name)
        repeats = target.shape[0] // values.shape[0]
        made = values.repeat(repeats, *[1] * (values.ndim - 1))
        if found[2].startswith("router.projection"):
            self._apart(made, values.shape[0], int(found[1]))
        target.copy_(made)  # rounded as it will be written, whatever the dtype of who asks

    def fill_rows(self, name: str, target: Tensor, first: int) -> None:
        """The same of its rows from ``first`` on."""
        target.copy_(self.read(name, target.dtype)[first : first + target.shape[0]])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return our tensor ``name``, by default in the dtype that ``state`` says."""
        values = torch.zeros_like(self.state[name], dtype=dtype, device="cpu")
        self.fill(name, values)
        return values

    def _apart(self, rows: Tensor, kept: int, layer: int) -> None:
        """Add noise of ``spread`` times their own size to all rows but the first of each expert.

        At least so much that rounding leaves most of it: of equal rows the first gets every token.
        """
        noise = torch.randn(rows[kept:].shape, generator=stream(self.asked.seed, layer, "apart"))
        size = rows[:kept].float().std() if rows[:kept].numel() > 1 else 1.0
        least = torch.finfo(rows.dtype).eps / 4
        rows[kept:] += (noise * size * max(spread(self.asked), least)).to(rows.dtype)
