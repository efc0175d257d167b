"""From a model config to an empty cache."""

from __future__ import annotations

import torch

from consilium.config.model import Model
from consilium.kv.paged import CachePart, PagedCache
from consilium.kv.rows import CacheFormat, rows_of


def build_pool(
    config: Model,
    *,
    pages: int,
    page: int,
    dtype: torch.dtype,
    form: CacheFormat = "model",
    device: torch.device | str = "cpu",
) -> PagedCache:
    """``pages`` of ``page`` tokens each, for sequences to take; ``dtype`` is that of the model.

    Raises ConsiliumError for a format that the model's attention has no use for.
    """
    rows = rows_of(config.attention, form, dtype)
    return PagedCache(layers=config.layers, pages=pages, page=page, rows=rows, device=device)


def token_bytes(config: Model, dtype: torch.dtype, form: CacheFormat = "model") -> int:
    """Bytes that a token takes in all layers."""
    rows = rows_of(config.attention, form, dtype)
    return config.layers * rows.width * rows.dtype.itemsize


def build_cache(
    config: Model,
    *,
    batch: int,
    capacity: int,
    dtype: torch.dtype,
    form: CacheFormat = "model",
    device: torch.device | str = "cpu",
) -> CachePart:
    """An empty cache for ``batch`` sequences of at most ``capacity`` tokens: a page for each."""
    pool = build_pool(config, pages=batch, page=capacity, dtype=dtype, form=form, device=device)
    return pool.part()
