"""What decoding keeps of each token."""

from __future__ import annotations

from consilium.config.attention import GQA
from consilium.config.model import Model
from consilium.records.plan import Windowed


def values_per_token(model: Model) -> int:
    """Cached values a token in all layers (keys and values, or MLA's latent and rotary key), without MTP.

    Those that a layer's window has left behind stay with the others, whose pages they share.
    """
    return model.layers * model.attention.cache_width


def windowed(model: Model) -> Windowed | None:
    """Which layers see a window, and what the others read of a token that is out of it; None without one."""
    layers = model.windowed_layers
    if not isinstance(model.attention, GQA) or model.attention.window is None:
        return None
    read = (model.layers - len(layers)) * model.attention.cache_width
    return Windowed(tokens=model.attention.window, layers=len(layers), kv_values_beyond=read)
