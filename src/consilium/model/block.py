"""A decoder block: attention and a feed-forward network, residual branches behind a norm or between two.

Legend: B sequences, S tokens, D hidden size, T = B * S flat tokens.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from consilium.attention.build import build_attention
from consilium.attention.types import Context
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.kv.types import LayerCache
from consilium.model.types import BlockResult
from consilium.moe.layer import MoELayer
from consilium.moe.types import Mode, Tokens
from consilium.ops.feed_forward import DenseNetwork
from consilium.ops.norm import RMSNorm


@final
class DenseBlock(nn.Module):
    def __init__(self, config: Model, network: FeedForward) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = build_attention(config.attention, config.hidden_size, config.norm_epsilon)
        self.attention_post_norm = _post_norm(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.feed_forward = DenseNetwork(config.hidden_size, network.width, network.activation)
        self.feed_forward_post_norm = _post_norm(config)

    def forward(
        self, x_BSD: Tensor, context: Context, tokens: Tokens, mode: Mode, cache: LayerCache | None
    ) -> BlockResult:
        y_BSD = self.attention(self.attention_norm(x_BSD), context, cache)
        x_BSD = x_BSD + self.attention_post_norm(y_BSD)
        y_BSD = self.feed_forward(self.feed_forward_norm(x_BSD))
        return BlockResult(x_BSD + self.feed_forward_post_norm(y_BSD))


@final
class MoEBlock(nn.Module):
    def __init__(self, config: Model, moe: MoE, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = build_attention(config.attention, config.hidden_size, config.norm_epsilon)
        self.attention_post_norm = _post_norm(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.moe = MoELayer(moe, config.hidden_size, layer)
        self.feed_forward_post_norm = _post_norm(config)

    def forward(
        self, x_BSD: Tensor, context: Context, tokens: Tokens, mode: Mode, cache: LayerCache | None
    ) -> BlockResult:
        y_BSD = self.attention(self.attention_norm(x_BSD), context, cache)
        x_BSD = x_BSD + self.attention_post_norm(y_BSD)
        result = self.moe(self.feed_forward_norm(x_BSD).flatten(0, 1), tokens, mode)
        y_BSD = self.feed_forward_post_norm(result.y_TD.view_as(x_BSD))
        return BlockResult(x_BSD + y_BSD, result.routing, result.report)


Block = DenseBlock | MoEBlock


def _post_norm(config: Model) -> nn.Module:
    """What a branch passes on its way back to the residual stream."""
    match config.norms:
        case "before":
            return nn.Identity()
        case "around":
            return RMSNorm(config.hidden_size, config.norm_epsilon)


def build_block(config: Model, layer: int) -> Block:
    """Block ``layer`` of the schedule; multi-token prediction modules count on from ``config.layers``."""
    if config.moe is not None and config.is_moe(layer):
        return MoEBlock(config, config.moe, layer)
    assert config.dense is not None, "the configuration checks that dense layers have a width"
    return DenseBlock(config, config.dense)


def branch_generator(generator: torch.Generator | None) -> int | None:
    """Draw the seed of one block's own noise, so that recomputing the block draws the same noise again."""
    if generator is None:
        return None
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
