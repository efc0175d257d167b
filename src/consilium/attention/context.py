"""Builds the context of a pass: rotary tables and who may look at whom.

Legend: B sequences, S new tokens, L keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilium.attention.types import Context, Peaks
from consilium.config.attention import GQA, MLA
from consilium.ops.documents import Documents
from consilium.ops.rope import rotary_tables


def build_context(
    config: GQA | MLA,
    position_BS: Tensor,
    *,
    sequence_BS: Tensor | None = None,
    valid_BS: Tensor | None = None,
    cached: bool = False,
    peaks_above: float | None = None,
) -> Context:
    """The context of a pass over tokens at ``position_BS``.

    Without a cache a token sees the tokens of its own document up to itself; documents are told apart by
    ``sequence_BS``. What is not ``valid_BS`` stands before or behind its document and is seen by no token
    of it. Raises ConsiliumError where it stands inside.

    With a cache a token sees the slots up to its own position. Every row of the batch is one sequence (no
    ``sequence_BS``), and padding stands to the right and counts on the positions of its row: it lies behind
    every token that matters and needs no mask. ``peaks_above`` asks for the largest logits, without a cache.
    Layers may see less of all that, a window.
    """
    assert not cached or sequence_BS is None, "a cache holds one sequence a row, not packed documents"
    cos_BSR, sin_BSR = tables_of(config, position_BS)
    return Context(
        position_BS,
        cos_BSR,
        sin_BSR,
        documents=None if cached else Documents.find(sequence_BS, valid_BS),
        seen_BSL=_slot_mask(position_BS) if cached else None,
        peaks=None if peaks_above is None else Peaks(peaks_above, valid_BS),
    )


def tables_of(config: GQA | MLA, position_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, S, R] of tokens at these positions."""
    return rotary_tables(config.rope, _rotated_width(config), position_BS)


def _slot_mask(position_BS: Tensor) -> Tensor | None:
    slot_L = torch.arange(int(position_BS.max()) + 1, device=position_BS.device)
    if slot_L.shape[0] == position_BS.shape[1] and bool((position_BS == slot_L).all()):
        return None
    return slot_L <= position_BS[:, :, None]


def _rotated_width(config: GQA | MLA) -> int:
    match config:
        case GQA():
            return config.rotated_dim
        case MLA():
            return config.rope_dim
