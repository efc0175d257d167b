"""From a model config to an empty cache."""

from __future__ import annotations

import torch

from consilium.config.model import Model
from consilium.kv.paged import CachePart, PagedCache
from consilium.kv.rows import CacheFormat, rows_of


def build_pool(  # noqa: PLR0913 - by keyword, each of its own
    config: Model,
    *,
    pages: int,
    page: int,
    dtype: torch.dtype,
    form: CacheFormat = "model",
    modules: int = 0,
    device: torch.device | str = "cpu",
) -> PagedCache:
    """``pages`` of ``page`` tokens each, for sequences to take; ``dtype`` is that of the model.

    Behind its layers come those of so many multi-token prediction ``modules``.

    Raises ConsiliumError for a format that the model's attention has no use for.
    """
    rows = rows_of(config.attention, form, dtype)
    return PagedCache(layers=config.layers + modules, pages=pages, page=page, rows=rows, device=device)


def token_bytes(config: Model, dtype: torch.dtype, form: CacheFormat = "model", modules: int = 0) -> int:
    """Bytes that a token takes in all layers, and in so many multi-token prediction ``modules``."""
    rows = rows_of(config.attention, form, dtype)
    return (config.layers + modules) * rows.width * rows.dtype.itemsize


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
