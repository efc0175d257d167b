"""Configurations and inputs that the attention tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from attention.naive import EPSILON, fill
from consilium.attention.build import build_attention
from consilium.attention.context import build_context
from consilium.attention.gqa import GroupedQueryAttention
from consilium.attention.mla import LatentAttention
from consilium.config.attention import GQA, MLA, Rope, Yarn
from consilium.kv.paged import PagedCache, PagedLayer
from consilium.kv.rows import Plain

HIDDEN = 20

YARN = Rope(interleaved=True, scaling=Yarn(factor=40, original_length=4096, mscale=1.0, mscale_all_dim=1.0))

CONFIGS: dict[str, GQA | MLA] = {
    "multi-head": GQA(heads=2, kv_heads=2, head_dim=6),
    "multi-query": GQA(heads=3, kv_heads=1, head_dim=4, rope=Rope(interleaved=True)),
    "head-norm": GQA(heads=4, kv_heads=2, head_dim=6, qk_norm="head", rope=Rope(theta=1e6)),
    "everything": GQA(
        heads=4, kv_heads=2, head_dim=6, qkv_bias=True, qk_norm="full", softcap=2.0, scale=0.7, rope=YARN
    ),
    "half-rotated": GQA(heads=4, kv_heads=2, head_dim=8, rope=Rope(fraction=0.5)),
    "quarter-rotated": GQA(
        heads=2, kv_heads=1, head_dim=8, qk_norm="head", rope=Rope(interleaved=True, fraction=0.25)
    ),
    "window": GQA(heads=4, kv_heads=2, head_dim=6, window=3),
    "window, everything": GQA(
        heads=4, kv_heads=2, head_dim=6, qkv_bias=True, qk_norm="full", softcap=2.0, window=4, rope=YARN
    ),
    "latent": MLA(heads=3, q_rank=None, kv_rank=10, nope_dim=6, rope_dim=4, v_dim=5),
    "latent-compressed": MLA(heads=3, q_rank=7, kv_rank=10, nope_dim=6, rope_dim=4, v_dim=5, rope=YARN),
    "latent-without-norm": MLA(
        heads=3,
        q_rank=None,
        kv_rank=10,
        nope_dim=6,
        rope_dim=8,
        v_dim=5,
        kv_norm="none",
        qkv_bias=True,
        rope=Rope(repeats=2, theta=100.0),
    ),
    "latent-all-rotated": MLA(
        heads=4,
        q_rank=5,
        kv_rank=6,
        nope_dim=0,
        rope_dim=12,
        v_dim=3,
        qkv_bias=True,
        rope=Rope(repeats=3, interleaved=True, scaling=YARN.scaling),
    ),
    "latent-wide-value": MLA(heads=2, q_rank=9, kv_rank=8, nope_dim=3, rope_dim=2, v_dim=9),
}


def built(config: GQA | MLA, seed: int = 0) -> GroupedQueryAttention | LatentAttention:
    module = build_attention(config, HIDDEN, EPSILON)
    fill(module, seed)
    return module


def random_x(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def counted(batch: int, tokens: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + tokens).expand(batch, tokens)


def empty_layer(config: GQA | MLA, batch: int, capacity: int) -> PagedLayer:
    return (
        PagedCache(layers=1, pages=batch, page=capacity, rows=Plain(config.cache_width, torch.float32))
        .part()
        .layer(0)
    )


def uncached(module: GroupedQueryAttention | LatentAttention, x_BSD: Tensor) -> Tensor:
    """One plain causal pass from position 0."""
    return module(x_BSD, build_context(module.config, counted(x_BSD.shape[0], x_BSD.shape[1]))).y_BSD


def cached(
    module: GroupedQueryAttention | LatentAttention, x_BSD: Tensor, position_BS: Tensor, layer: PagedLayer
) -> Tensor:
    return module(x_BSD, build_context(module.config, position_BS, cached=True), layer).y_BSD
