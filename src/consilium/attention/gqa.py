"""Grouped-query attention (2305.13245) with rotary positions.

Legend: B sequences, S new tokens, L keys, D hidden, H query heads, G key/value heads, P width of a head,
C = 2GP cached values a token.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from consilium.attention.tiles import attend_tiles
from consilium.attention.types import Attended, Context
from consilium.config.attention import GQA
from consilium.kv.types import LayerCache
from consilium.ops.documents import attend_documents
from consilium.ops.linear import Linear
from consilium.ops.norm import RMSNorm
from consilium.ops.rope import rotate
from consilium.ops.sight import Sight


@final
class GroupedQueryAttention(nn.Module):
    """Multi-head, grouped-query or multi-query attention. A cached row is [keys | values] of all kv heads.

    With a window, rows that no later query sees stay in the cache: its pages are those of all layers.
    """

    def __init__(self, config: GQA, hidden_size: int, norm_epsilon: float) -> None:
        super().__init__()
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.config = config
        self.q = Linear(hidden_size, queries, bias=config.qkv_bias)
        self.k = Linear(hidden_size, keys, bias=config.qkv_bias)
        self.v = Linear(hidden_size, keys, bias=config.qkv_bias)
        self.o = Linear(queries, hidden_size)
        self.q_norm = _norm(config, config.heads, norm_epsilon)
        self.k_norm = _norm(config, config.kv_heads, norm_epsilon)

    def forward(self, x_BSD: Tensor, context: Context, cache: LayerCache | None = None) -> Attended:
        """Attend over the new tokens, or over the cache once they are written to it: [B, S, D]."""
        q_BSHP = self._rotated(self.q(x_BSD), self.q_norm, context)
        k_BSGP = self._rotated(self.k(x_BSD), self.k_norm, context)
        v_BSGP = self.v(x_BSD).unflatten(-1, (-1, self.config.head_dim))
        sight = Sight(self.config.softmax_scale, self.config.softcap, self.config.window)
        if cache is None:
            y_BSHP = attend_documents(q_BSHP, k_BSGP, v_BSGP, context.documents, sight)
            return Attended(self.o(y_BSHP.flatten(-2)))
        view = cache.view(context.keys)
        cache.write(torch.cat((k_BSGP.flatten(-2), v_BSGP.flatten(-2)), -1), context.position_BS)
        tiles = [self._keys_and_values(rows_BLC) for rows_BLC in view.tiles(x_BSD.dtype)]
        y_BHSP = attend_tiles(q_BSHP.transpose(1, 2), tiles, context, sight)
        return Attended(self.o(y_BHSP.transpose(1, 2).flatten(-2)))

    def _keys_and_values(self, rows_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, L, P] of cached rows."""
        k_BGLP, v_BGLP = rows_BLC.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2).chunk(2, 1)
        return k_BGLP, v_BGLP

    def _rotated(self, flat_BSX: Tensor, norm: nn.Module, context: Context) -> Tensor:
        """Queries or keys of every head: normalised over a head or over all of them, then rotated."""
        heads = (-1, self.config.head_dim)
        match self.config.qk_norm:
            case "none" | "head":
                x_BSHP = norm(flat_BSX.unflatten(-1, heads))
            case "full":
                x_BSHP = norm(flat_BSX).unflatten(-1, heads)
        return rotate(x_BSHP, context.cos_BSR, context.sin_BSR, interleaved=self.config.rope.interleaved)


def _norm(config: GQA, heads: int, epsilon: float) -> nn.Module:
    match config.qk_norm:
        case "none":
            return nn.Identity()
        case "head":
            return RMSNorm(config.head_dim, epsilon)
        case "full":
            return RMSNorm(heads * config.head_dim, epsilon)
