"""One micro-batch of packed sequences.

Legend: B rows, S tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    ids_BS: Tensor
    """int64 token ids; any valid id where not valid."""
    targets_BS: Tensor
    """int64 next token of the same document, -1 where there is none to predict."""
    sequence_BS: Tensor
    """int64 document number inside the row, from 0; tokens attend inside their own document only."""
    position_BS: Tensor
    """int64 position inside the document as cut by packing, from 0."""
    valid_BS: Tensor
    """bool; False is padding, which takes part in nothing."""

    def to(self, device: torch.device) -> Batch:
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})
