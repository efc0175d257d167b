"""What decoding keeps of each token."""

from __future__ import annotations

from consilium.config.model import Model


def values_per_token(model: Model) -> int:
    """Cached values a token in all layers (keys and values, or MLA's latent and rotary key), without MTP."""
    return model.layers * model.attention.cache_width
