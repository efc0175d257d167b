"""Attention over the tiles of a cache's view.

Legend: B sequences, S new tokens, L slots of one tile, H query heads, G key/value heads, K width of a key, V
width of a value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from consilium.attention.types import Context
from consilium.ops.attention import attend, attend_part, merge


def attend_tiles(
    q_BHSK: Tensor,
    tiles: Sequence[tuple[Tensor, Tensor]],
    context: Context,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention over keys [B, G, L, K] and values [B, G, L, V] of consecutive slots: [B, H, S, V].

    One tile is one call of the fused kernel; several are merged by their log-sum-exp, in order.
    """
    if len(tiles) == 1:
        ((k_BGLK, v_BGLV),) = tiles
        return attend(q_BHSK, k_BGLK, v_BGLV, mask_BSL=context.seen_BSL, scale=scale, softcap=softcap)
    parts, first = [], 0
    for k_BGLK, v_BGLV in tiles:
        slot_L = torch.arange(first, first + k_BGLK.shape[2], device=q_BHSK.device)
        seen_BSL = slot_L <= context.position_BS[:, :, None]
        parts.append(attend_part(q_BHSK, k_BGLK, v_BGLV, mask_BSL=seen_BSL, scale=scale, softcap=softcap))
        first += slot_L.shape[0]
    return merge(parts).values_BHSV.to(q_BHSK.dtype)
