"""From an attention config to a module."""

from __future__ import annotations

from consilium.attention.gqa import GroupedQueryAttention
from consilium.attention.mla import LatentAttention
from consilium.config.attention import GQA, MLA


def build_attention(
    config: GQA | MLA, hidden_size: int, norm_epsilon: float
) -> GroupedQueryAttention | LatentAttention:
    """The module ``config`` describes, weights uninitialised."""
    match config:
        case GQA():
            return GroupedQueryAttention(config, hidden_size, norm_epsilon)
        case MLA():
            return LatentAttention(config, hidden_size, config.norm_epsilon or norm_epsilon)
