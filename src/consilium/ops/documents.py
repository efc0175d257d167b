"""Attention inside packed documents, which are known by where they begin.

Legend: B rows, S tokens a row, T = B * S flat tokens, H query heads, G key/value heads, K width of a key, V
width of a value.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, compress
from typing import Final, final

import torch
from torch import Tensor

from consilium.errors import ConsiliumError
from consilium.ops.attention import attend
from consilium.ops.sight import Sight, attend_whole

SHORT: Final = 256
"""Tokens of a row up to which one masked call for all rows beats a call a document (docs/log.md)."""


@final
@dataclass(frozen=True, slots=True)
class Documents:
    """Documents end to end in rows: none crosses from one row into the next."""

    lengths: tuple[int, ...]
    """Tokens of each, on the host; their sum is T."""
    number_BS: Tensor
    """int64: which document of its row a token belongs to."""
    seen_BSS: Tensor | None
    """bool, made once a pass where rows are short: True where a query may look at a key."""

    @staticmethod
    def find(sequence_BS: Tensor | None, valid_BS: Tensor | None) -> Documents | None:
        """The documents of a pass, or None where every row is one.

        Padding may stand before a document, where it is one by itself, or behind it, where causality hides
        it. Waits for the device once. Raises ConsiliumError where a document comes in pieces.
        """
        like_BS = sequence_BS if sequence_BS is not None else valid_BS
        if like_BS is None:
            return None
        begins_BS = torch.zeros_like(like_BS, dtype=torch.bool)
        begins_BS[:, :1] = True
        if sequence_BS is not None:
            begins_BS[:, 1:] |= sequence_BS[:, 1:] != sequence_BS[:, :-1]
        if valid_BS is not None:
            begins_BS[:, 1:] |= valid_BS[:, 1:] & ~valid_BS[:, :-1]
        starts = begins_BS.flatten().nonzero().squeeze(1)
        if starts.shape[0] == like_BS.shape[0]:
            return None
        _refuse_pieces(starts, like_BS.shape[1], sequence_BS, valid_BS)
        ends = [*starts[1:].tolist(), like_BS.numel()]
        lengths = tuple(end - start for start, end in zip(starts.tolist(), ends, strict=True))
        number_BS = begins_BS.cumsum(1)
        short = like_BS.shape[1] <= SHORT
        seen_BSS = (number_BS[:, :, None] == number_BS[:, None, :]).tril() if short else None
        return Documents(lengths, number_BS, seen_BSS)

    def part(self, begin: int, end: int) -> Documents:
        """The documents of some consecutive rows."""
        tokens, seen_BSS = self.number_BS.shape[1], self.seen_BSS
        starts = [0, *accumulate(self.lengths)][:-1]
        inside = (begin * tokens <= start < end * tokens for start in starts)
        lengths = tuple(compress(self.lengths, inside))
        return Documents(
            lengths, self.number_BS[begin:end], None if seen_BSS is None else seen_BSS[begin:end]
        )


def _refuse_pieces(starts: Tensor, tokens: int, sequence_BS: Tensor | None, valid_BS: Tensor | None) -> None:
    name = torch.zeros_like(starts) if sequence_BS is None else sequence_BS.flatten()[starts]
    real = torch.ones_like(starts, dtype=torch.bool) if valid_BS is None else valid_BS.flatten()[starts]
    pieces = Counter(zip((starts // tokens)[real].tolist(), name[real].tolist(), strict=True))
    broken = [place for place, count in pieces.items() if count > 1]
    if broken:
        row, number = broken[0]
        raise ConsiliumError(
            f"document {number} of row {row} comes in pieces, with padding or other documents inside it; put"
            " the tokens of a document side by side."
        )


def attend_documents(
    q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, documents: Documents | None, sight: Sight
) -> Tensor:
    """Causal attention inside each document, or each row where there are none: [B, S, H, V].

    Rows that are short are computed together, each under the mask of its documents. In longer ones every
    document is a call of its own: what it costs grows with its own length, not with the row's.
    """

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_whole(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), sight).transpose(1, 2)

    if documents is None:
        return causal(q_BSHK, k_BSGK, v_BSGV)
    if (seen_BSS := documents.seen_BSS) is not None:
        # A document lies in one piece, so that places in the row are as far apart as those in it.
        mask_BSS = seen_BSS if sight.window is None else seen_BSS.triu(1 - sight.window)
        heads = (x.transpose(1, 2) for x in (q_BSHK, k_BSGK, v_BSGV))
        return attend(*heads, mask_BSL=mask_BSS, scale=sight.scale, softcap=sight.softcap).transpose(1, 2)
    parts = zip(*(x.flatten(0, 1).split(documents.lengths) for x in (q_BSHK, k_BSGK, v_BSGV)), strict=True)
    alone = [causal(*(x[None] for x in part))[0] for part in parts]
    return torch.cat(alone).unflatten(0, q_BSHK.shape[:2])
