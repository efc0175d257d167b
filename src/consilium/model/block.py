"""A decoder block: attention and a feed-forward network, residual branches behind a norm or between two.

Legend: B sequences, S tokens, D hidden size, T = B * S flat tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from consilium.attention.build import build_attention
from consilium.attention.types import Attended, Context
from consilium.config.model import Model
from consilium.kv.types import Cache, LayerCache
from consilium.model.types import BlockResult, Options
from consilium.moe.layer import MoELayer
from consilium.moe.transport import Transports, local
from consilium.moe.types import Mode, Tokens
from consilium.ops.feed_forward import DenseNetwork
from consilium.ops.norm import RMSNorm


class DecoderBlock(nn.Module, ABC):
    """Block ``layer`` of the schedule; multi-token prediction modules count on from ``config.layers``.

    Its second half is ``moe`` where the layer routes and ``feed_forward`` where it does not.
    """

    def __init__(self, config: Model, layer: int, transports: Transports = local) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = build_attention(config.attention.at(layer), config.hidden_size, config.norm_epsilon)
        self.attention_post_norm = _post_norm(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.moe: MoELayer | None = None
        self.feed_forward: DenseNetwork | None = None
        if config.moe is not None and config.is_moe(layer):
            self.moe = MoELayer(config.moe, config.hidden_size, layer, transports)
        else:
            assert config.dense is not None, "the configuration checks that dense layers have a width"
            self.feed_forward = DenseNetwork(config.hidden_size, config.dense.width, config.dense.activation)
        self.feed_forward_post_norm = _post_norm(config)

    @abstractmethod
    def forward(
        self, x_BSD: Tensor, context: Context, tokens: Tokens, mode: Mode, cache: LayerCache | None
    ) -> BlockResult: ...

    def attend(self, x_BSD: Tensor, context: Context, cache: LayerCache | None = None) -> Attended:
        """The first half, residual included."""
        attended: Attended = self.attention(self.attention_norm(x_BSD), context, cache)
        return replace(attended, y_BSD=x_BSD + self.attention_post_norm(attended.y_BSD))

    def whole(
        self, x_BSD: Tensor, context: Context, tokens: Tokens, mode: Mode, cache: LayerCache | None
    ) -> BlockResult:
        """Both halves one after the other."""
        attended = self.attend(x_BSD, context, cache)
        x_BSD = attended.y_BSD
        fed = self.feed(self.feed_forward_norm(x_BSD), tokens, mode)
        y_BSD = self.feed_forward_post_norm(fed.x_BSD)
        return BlockResult(x_BSD + y_BSD, fed.routing, fed.report, attended.largest_H)

    def feed(self, normed_BSD: Tensor, tokens: Tokens, mode: Mode) -> BlockResult:
        """What the network or the experts make of their input, without the norm behind and the residual."""
        if self.feed_forward is not None:
            return BlockResult(self.feed_forward(normed_BSD))
        assert self.moe is not None, "a block is dense or routes"
        result = self.moe(normed_BSD.flatten(0, 1), tokens, mode.at(self.moe.layer))
        return BlockResult(result.y_TD.view_as(normed_BSD), result.routing, result.report)


Blocks = Callable[[Model, int], DecoderBlock]
"""Builds the block of an index."""


@final
class Block(DecoderBlock):
    """All tokens of a pass at once."""

    def forward(
        self, x_BSD: Tensor, context: Context, tokens: Tokens, mode: Mode, cache: LayerCache | None
    ) -> BlockResult:
        return self.whole(x_BSD, context, tokens, mode, cache)


def _post_norm(config: Model) -> nn.Module:
    """What a branch passes on its way back to the residual stream."""
    match config.norms:
        case "before":
            return nn.Identity()
        case "around":
            return RMSNorm(config.hidden_size, config.norm_epsilon)


def run_block(
    block: nn.Module, x_BSD: Tensor, context: Context, tokens: Tokens, options: Options, cache: Cache | None
) -> BlockResult:
    """Run one block with noise of its own, and with its activations recomputed where ``options`` ask so."""
    assert isinstance(block, DecoderBlock)
    seed = branch_seed(options.mode.generator)
    layer_cache = None if cache is None else cache.layer(block.layer)

    def call(x_BSD: Tensor) -> BlockResult:
        generator = None if seed is None else torch.Generator(x_BSD.device).manual_seed(seed)
        mode = replace(options.mode, generator=generator)
        return block(x_BSD, context, tokens, mode, layer_cache)

    if options.recompute and torch.is_grad_enabled():
        return checkpoint(call, x_BSD, use_reentrant=False)
    return call(x_BSD)


def branch_seed(generator: torch.Generator | None) -> int | None:
    """Draw the seed of one block's own noise, so that recomputing the block draws the same noise again."""
    if generator is None:
        return None
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
