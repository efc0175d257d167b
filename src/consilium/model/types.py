"""What goes into a pass of the decoder and what comes out.

Legend: B sequences, S tokens, D hidden size, V vocabulary, H heads, T = B * S flat tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.data.batch import Batch
from consilium.errors import ConsiliumError
from consilium.moe.types import Mode, Report, Routing, Tokens


@dataclass(frozen=True, slots=True)
class Inputs:
    """Token ids and where they stand.

    Absent fields mean: one document a row, positions from 0, no padding.
    """

    ids_BS: Tensor
    sequence_BS: Tensor | None = None
    """int64 document number inside the row; tokens attend inside their own document only."""
    position_BS: Tensor | None = None
    """int64 position inside the document; with a cache, the slot."""
    valid_BS: Tensor | None = None
    """bool; False is padding."""

    @staticmethod
    def of(batch: Batch) -> Inputs:
        return Inputs(batch.ids_BS, batch.sequence_BS, batch.position_BS, batch.valid_BS)

    def to(self, device: str) -> Inputs:
        optional = (self.sequence_BS, self.position_BS, self.valid_BS)
        return Inputs(
            self.ids_BS.to(device), *(None if x_BS is None else x_BS.to(device) for x_BS in optional)
        )

    def positions(self) -> Tensor:
        if self.position_BS is not None:
            return self.position_BS
        return torch.arange(self.ids_BS.shape[1], device=self.ids_BS.device).expand_as(self.ids_BS)

    def tokens(self) -> Tokens:
        """The flat view that routing reads; every document is one sequence of the micro-batch."""
        rows = self.ids_BS.shape[0]
        row_BS = torch.arange(rows, device=self.ids_BS.device)[:, None].expand_as(self.ids_BS)
        sequence_BS, documents = row_BS, 1
        if self.sequence_BS is not None and self.sequence_BS.numel():
            documents = int(self.sequence_BS.max()) + 1
            sequence_BS = row_BS * documents + self.sequence_BS
        valid_BS = torch.ones_like(self.ids_BS, dtype=torch.bool) if self.valid_BS is None else self.valid_BS
        return Tokens(
            ids_T=self.ids_BS.flatten(),
            sequence_T=sequence_BS.flatten(),
            position_T=self.positions().flatten(),
            valid_T=valid_BS.flatten(),
            row_T=row_BS.flatten(),
            sequences=rows * documents,
        )


@dataclass(frozen=True, slots=True)
class Options:
    """How a pass runs. ``dtype`` is that of the matrix products (None: the weights' own)."""

    mode: Mode = Mode()
    dtype: torch.dtype | None = None
    recompute: bool = False
    """Keep only block inputs and recompute the rest in the backward pass."""
    routings: bool = False
    """Return every layer's decision, graph included; otherwise it goes when its layer is done."""
    peaks_above: float | None = None
    """Return the largest logit of each head of latent attention, exact where it exceeds this."""

    def __post_init__(self) -> None:
        if self.recompute and self.mode.observer is not None:
            raise ConsiliumError(
                "an observer would see every row twice where blocks are recomputed; set recompute to False."
            )


@dataclass(frozen=True, slots=True)
class BlockResult:
    x_BSD: Tensor
    routing: Routing | None = None
    report: Report | None = None
    largest_H: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Objective:
    """What a pass is asked to predict. With it the decoder returns losses and no logits."""

    targets_BS: Tensor
    """int64 token after each; -1 where there is nothing to predict."""
    ahead: bool = True
    """Run the multi-token prediction modules as well, which training alone needs."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """A pass before the head."""

    final_BSD: Tensor
    """After the last norm."""
    reports: tuple[Report, ...]
    """Of every MoE layer that ran; each says which it is."""
    routings: Mapping[int, Routing]
    """By index of the MoE layer; empty unless ``Options.routings`` asks for them."""
    largest: Mapping[int, Tensor]
    """float32 [H] by index of the block; empty unless ``Options.peaks_above`` asks for them."""


@dataclass(frozen=True, slots=True)
class Output:
    logits: Tensor
    """float32 [B, S, V]."""
    reports: Mapping[int, Report]
    routings: Mapping[int, Routing]


@dataclass(frozen=True, slots=True)
class Losses:
    """Of one pass with an objective: float32 scalars with gradient, in nats, summed over tokens."""

    nll: Tensor
    """Of the next token."""
    ahead: tuple[Tensor, ...]
    """Of the token that each multi-token prediction module predicts; empty where none ran."""
    targets: Tensor
    """int64 scalar: tokens in ``nll``."""
    reports: Mapping[int, Report]
    """By index of the MoE layer, those of the modules included."""
    routings: Mapping[int, Routing]
    largest: Mapping[int, Tensor]
    """Largest logits [H] by index of the block, those of the modules included; empty unless asked for."""
