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
from consilium.ops.sight import Sight, attend_whole


def attend_tiles(
    q_BHSK: Tensor, tiles: Sequence[tuple[Tensor, Tensor]], context: Context, sight: Sight
) -> Tensor:
    """Attention over keys [B, G, L, K] and values [B, G, L, V] of consecutive slots: [B, H, S, V].

    One tile is one call of the fused kernel; several are merged by their log-sum-exp, in order. Slots that a
    window has left behind are read and weigh nothing.
    """
    if len(tiles) == 1 and context.seen_BSL is None:
        return attend_whole(q_BHSK, *tiles[0], sight)
    scale, softcap = sight.scale, sight.softcap
    if len(tiles) == 1:
        mask_BSL = context.seen_BSL if sight.window is None else _seen(context, 0, context.keys, sight)
        return attend(q_BHSK, *tiles[0], mask_BSL=mask_BSL, scale=scale, softcap=softcap)
    parts, first = [], 0
    for k_BGLK, v_BGLV in tiles:
        end = first + k_BGLK.shape[2]
        seen_BSL = _seen(context, first, end, sight)
        parts.append(attend_part(q_BHSK, k_BGLK, v_BGLV, mask_BSL=seen_BSL, scale=scale, softcap=softcap))
        first = end
    return merge(parts).values_BHSV.to(q_BHSK.dtype)


def _seen(context: Context, first: int, end: int, sight: Sight) -> Tensor:
    """Which of the slots from ``first`` to before ``end`` each query sees: [B, S, L]."""
    return sight.of(context.position_BS, torch.arange(first, end, device=context.position_BS.device))
