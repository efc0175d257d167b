"""Attention in which a query sees itself and the tokens just before it (Mistral, 2310.06825 section 2).

Legend: B sequences, S queries, L keys, H query heads, G key/value heads, K width of a key, V width of a
value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from consilium.ops.attention import attend

STRIPE: Final = 512
"""Queries of one call: the memory of its mask and the keys that it reads in vain grow with them."""


@final
@dataclass(frozen=True, slots=True)
class Sight:
    """What a layer does with products of queries and keys, and how far its queries see."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    """Tokens that a query sees, itself included; None for all up to itself."""

    def of(self, position_BS: Tensor, slot_L: Tensor) -> Tensor:
        """Bool [B, S, L]: which of these slots queries at these positions see."""
        seen_BSL = slot_L <= position_BS[:, :, None]
        return (
            seen_BSL if self.window is None else seen_BSL & (slot_L > position_BS[:, :, None] - self.window)
        )


def attend_whole(q_BHSK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, sight: Sight) -> Tensor:
    """Causal attention of one whole text a row: [B, H, S, V].

    With a window, a stripe of queries at a time meets the keys that it sees, so that costs grow with the
    window and not with the text. One as long as the text changes nothing.
    """
    scale, softcap, tokens = sight.scale, sight.softcap, q_BHSK.shape[2]
    if sight.window is None or sight.window >= tokens:
        return attend(q_BHSK, k_BGSK, v_BGSV, mask_BSL=None, scale=scale, softcap=softcap)
    place_S, parts = torch.arange(tokens, device=q_BHSK.device), list[Tensor]()
    for first in range(0, tokens, STRIPE):
        end, begin = min(first + STRIPE, tokens), max(0, first + 1 - sight.window)
        mask_BSL = sight.of(place_S[None, first:end], place_S[begin:end])
        stripe = (q_BHSK[:, :, first:end], k_BGSK[:, :, begin:end], v_BGSV[:, :, begin:end])
        parts.append(attend(*stripe, mask_BSL=mask_BSL, scale=scale, softcap=softcap))
    return torch.cat(parts, 2)
