"""Multi-head latent attention (DeepSeek-V2, 2405.04434 section 2.1 and appendix C).

Legend: B sequences, S new tokens, L keys, D hidden, H heads, N width of a head without position, R width of
the rotated part (one rotated key is shared by all heads), V width of a value, Z rank of the key/value
latent, C = Z + R cached values a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from consilium.attention.tiles import attend_tiles
from consilium.attention.types import Attended, Context
from consilium.config.attention import MLA
from consilium.kv.types import LayerCache
from consilium.ops.attention import attend_latent
from consilium.ops.documents import attend_documents
from consilium.ops.linear import Linear
from consilium.ops.norm import RMSNorm
from consilium.ops.peaks import largest_logits
from consilium.ops.rope import rotate
from consilium.ops.sight import Sight
from consilium.ops.weights import Dense, Matrix
from consilium.parallel.part import Part, whole


@dataclass(frozen=True, slots=True)
class Expand:
    """Keys without position and values of every head: [B, L, H, N + V]."""

    latent_BLZ: Tensor


@dataclass(frozen=True, slots=True)
class Absorb:
    """Queries moved into the latent space: q W_UK, [B, S, H, Z]."""

    nope_BSHN: Tensor


@dataclass(frozen=True, slots=True)
class Release:
    """Averages of latents moved out of it: W_UV c, [B, S, H, V]."""

    latent_BHSZ: Tensor


@final
class LatentUp(nn.Module):
    """W_UK and W_UV of every head, two views of ``weight`` [H * (N + V), Z].

    Every use goes through ``forward``: there, hooks that gather a sharded matrix fire.
    """

    def __init__(self, config: MLA) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(
            torch.empty(config.heads * (config.nope_dim + config.v_dim), config.kv_rank)
        )

    @property
    def matrix(self) -> Matrix:
        return Dense(self.weight)

    def forward(self, question: Expand | Absorb | Release) -> Tensor:
        heads, nope, v = self.config.heads, self.config.nope_dim, self.config.v_dim
        match question:
            case Expand(latent_BLZ=latent_BLZ):
                return self.matrix.times(latent_BLZ).unflatten(-1, (heads, -1))
            case Absorb(nope_BSHN=nope_BSHN):
                key_HNZ = self.weight.to(nope_BSHN.dtype).unflatten(0, (heads, -1))[:, :nope]
                return torch.einsum("bshn,hnz->bshz", nope_BSHN, key_HNZ)
            case Release(latent_BHSZ=latent_BHSZ):
                value_HVZ = self.weight.to(latent_BHSZ.dtype).unflatten(0, (heads, -1))[:, nope : nope + v]
                return torch.einsum("bhsz,hvz->bshv", latent_BHSZ, value_HVZ)


@final
class LatentAttention(nn.Module):
    """Attention whose keys and values are functions of one small latent a token, which is all that is cached.

    A cached row is [latent after its norm | shared key after its rotation]. There are two ways to the same
    values. Expanded: latents become the keys and values of every head (training and prompts). Absorbed:
    (q W_UK) c = q (W_UK c), so queries move into the latent space and attend to the cached rows themselves.
    W_UK and W_UV stay two views of ``kv_up``: fused into their neighbours they would be larger, not smaller.
    """

    def __init__(self, config: MLA, hidden_size: int, norm_epsilon: float) -> None:
        super().__init__()
        self.config = config
        queries = config.heads * (config.nope_dim + config.rope_dim)
        if config.q_rank is None:
            self.q = Linear(hidden_size, queries, bias=config.qkv_bias)
        else:
            self.q_down = Linear(hidden_size, config.q_rank, bias=config.qkv_bias)
            self.q_norm = RMSNorm(config.q_rank, norm_epsilon)
            self.q_up = Linear(config.q_rank, queries)
        self.kv_down = Linear(hidden_size, config.kv_rank + config.rope_dim, bias=config.qkv_bias)
        self.kv_norm = _norm(config, norm_epsilon)
        self.kv_up = LatentUp(config)
        self.o = Linear(config.heads * config.v_dim, hidden_size)

    def forward(self, x_BSD: Tensor, context: Context, cache: LayerCache | None = None) -> Attended:
        """Attend over the new tokens, or over the cache once they are written to it: [B, S, D]."""
        nope_BSHN, rope_BSHR = self._queries(x_BSD, context)
        rows_BSC = self._rows(x_BSD, context)
        tiles = (rows_BSC,)
        if cache is not None:
            view = cache.view(context.keys)
            cache.write(rows_BSC, context.position_BS)
            tiles = view.tiles(x_BSD.dtype)
        if self._absorbs(context, cached=cache is not None):
            y_BSHV, largest_H = self._absorbed(nope_BSHN, rope_BSHR, tiles, context), None
        else:
            y_BSHV, largest_H = self._expanded(nope_BSHN, rope_BSHR, tiles, context)
        return Attended(self.o(y_BSHV.flatten(-2)), largest_H)

    @torch.no_grad()
    def cool(self, share_H: Tensor, part_of: Callable[[Tensor], Part] = whole) -> None:
        """Multiply the logits of each head by its share, a number of at most 1, through the weights.

        Queries and keys without position take a root of it each. The rotated key is shared by all heads and
        stays, so that rotated queries take all of it. What is frozen stays as it is.
        """
        config = self.config
        query, key = self.q if config.q_rank is None else self.q_up, self.kv_up
        root_H1, one_H1 = share_H.sqrt()[:, None], torch.ones_like(share_H)[:, None]
        by_row = {
            query.weight: (root_H1.expand(-1, config.nope_dim), share_H[:, None].expand(-1, config.rope_dim)),
            key.weight: (root_H1.expand(-1, config.nope_dim), one_H1.expand(-1, config.v_dim)),
        }
        if query.bias is not None and config.q_rank is None:
            by_row[query.bias] = by_row[query.weight]
        for weight, shares in by_row.items():
            if weight.requires_grad:
                part = part_of(weight)
                share_R = torch.cat(shares, 1).flatten()[part.rows.start : part.rows.stop]
                part.here.mul_(share_R if weight.ndim == 1 else share_R[:, None])

    def _queries(self, x_BSD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Queries of every head, the part without position and the rotated part."""
        config = self.config
        flat_BSX = self.q(x_BSD) if config.q_rank is None else self.q_up(self.q_norm(self.q_down(x_BSD)))
        widths = (config.nope_dim, config.rope_dim)
        nope_BSHN, rope_BSHR = flat_BSX.unflatten(-1, (config.heads, -1)).split(widths, -1)
        return nope_BSHN, self._rotated(rope_BSHR, context)

    def _rows(self, x_BSD: Tensor, context: Context) -> Tensor:
        """What is cached of the new tokens, [B, S, C]. The shared key has no norm."""
        latent_BSZ, key_BSR = self.kv_down(x_BSD).split((self.config.kv_rank, self.config.rope_dim), -1)
        return torch.cat((self.kv_norm(latent_BSZ), self._rotated(key_BSR[:, :, None], context)[:, :, 0]), -1)

    def _rotated(self, x_BSHR: Tensor, context: Context) -> Tensor:
        return rotate(x_BSHR, context.cos_BSR, context.sin_BSR, interleaved=self.config.rope.interleaved)

    def _absorbs(self, context: Context, *, cached: bool) -> bool:
        """Few new tokens on a longer cache absorb; a fresh prompt has nothing to expand twice."""
        match context.latent_path:
            case "expanded":
                return False
            case "absorbed":
                return True
            case "auto":
                tokens = context.position_BS.shape[1]
                return cached and tokens < context.keys and tokens < self.config.absorb_below

    def _expanded(
        self, nope_BSHN: Tensor, rope_BSHR: Tensor, tiles: Sequence[Tensor], context: Context
    ) -> tuple[Tensor, Tensor | None]:
        """Values [B, S, H, V], and the largest logits [H] where they were asked for."""
        q_BSHK, scale = torch.cat((nope_BSHN, rope_BSHR), -1), self.config.softmax_scale
        expanded = [self._keys_and_values(rows_BLC) for rows_BLC in tiles]
        largest_H = None
        if (peaks := context.peaks) is not None:
            largest_H = largest_logits(
                q_BSHK, expanded[0][0], context.documents, peaks.valid_BS, scale=scale, above=peaks.above
            )
        if context.documents is not None:
            ((k_BSHK, v_BSHV),) = expanded
            y_BSHV = attend_documents(q_BSHK, k_BSHK, v_BSHV, context.documents, Sight(scale))
            return y_BSHV, largest_H
        heads = [(k_BLHK.transpose(1, 2), v_BLHV.transpose(1, 2)) for k_BLHK, v_BLHV in expanded]
        y_BHSV = attend_tiles(q_BSHK.transpose(1, 2), heads, context, Sight(scale))
        return y_BHSV.transpose(1, 2), largest_H

    def _keys_and_values(self, rows_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, L, H, N + R] and values [B, L, H, V] of every head."""
        config = self.config
        latent_BLZ, key_BLR = rows_BLC.split((config.kv_rank, config.rope_dim), -1)
        widths = (config.nope_dim, config.v_dim)
        key_BLHN, v_BLHV = self.kv_up(Expand(latent_BLZ)).split(widths, -1)
        shared_BLHR = key_BLR[:, :, None].expand(-1, -1, config.heads, -1)
        return torch.cat((key_BLHN, shared_BLHR), -1), v_BLHV

    def _absorbed(
        self, nope_BSHN: Tensor, rope_BSHR: Tensor, tiles: Sequence[Tensor], context: Context
    ) -> Tensor:
        assert context.documents is None, "absorbed attention reads a cache, which holds one sequence a row"
        config = self.config
        q_BHSC = torch.cat((self.kv_up(Absorb(nope_BSHN)), rope_BSHR), -1).transpose(1, 2)
        if len(tiles) == 1:
            y_BHSC = attend_latent(q_BHSC, tiles[0], mask_BSL=context.seen_BSL, scale=config.softmax_scale)
        else:
            shared = [(rows_BLC[:, None], rows_BLC[:, None]) for rows_BLC in tiles]
            y_BHSC = attend_tiles(q_BHSC, shared, context, Sight(config.softmax_scale))
        y_BSHV: Tensor = self.kv_up(Release(y_BHSC[..., : config.kv_rank]))
        return y_BSHV


def _norm(config: MLA, epsilon: float) -> nn.Module:
    match config.kv_norm:
        case "rms":
            return RMSNorm(config.kv_rank, epsilon)
        case "none":
            return nn.Identity()
