"""From a model config to an empty cache."""

from __future__ import annotations

import torch

from consilium.config.model import Model
from consilium.kv.dense import DenseCache


def build_cache(
    config: Model, *, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> DenseCache:
    """An empty cache for ``batch`` sequences of at most ``capacity`` tokens."""
    width = config.attention.cache_width
    return DenseCache(
        layers=config.layers, batch=batch, capacity=capacity, width=width, dtype=dtype, device=device
    )
