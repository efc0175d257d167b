"""From a model config to an empty cache."""

from __future__ import annotations

import torch

from consilium.config.model import Model
from consilium.kv.paged import CachePart, PagedCache


def build_pool(
    config: Model, *, pages: int, page: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> PagedCache:
    """``pages`` of ``page`` tokens each, for sequences to take."""
    width = config.attention.cache_width
    return PagedCache(layers=config.layers, pages=pages, page=page, width=width, dtype=dtype, device=device)


def build_cache(
    config: Model, *, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> CachePart:
    """An empty cache for ``batch`` sequences of at most ``capacity`` tokens: a page for each."""
    return build_pool(config, pages=batch, page=capacity, dtype=dtype, device=device).part()
