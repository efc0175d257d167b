"""A block that computes one half of its rows while those of the other half travel between processes.

Legend: B sequences, S tokens, D hidden size, T = B * S flat tokens, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import final

import torch
from torch import Tensor

from consilium.attention.types import Context
from consilium.kv.types import LayerCache
from consilium.model.block import DecoderBlock
from consilium.model.types import BlockResult
from consilium.moe.layer import Going, MoELayer
from consilium.moe.types import LayerMode, Mode, Routing, Tokens


@dataclass(frozen=True, slots=True)
class _Half:
    x_BSD: Tensor
    """After attention."""
    largest_H: Tensor | None
    going: Going


@final
class OverlappedBlock(DecoderBlock):
    """The values of ``Block``, in training, with two micro-batches on their way instead of one.

    While rows of the first half of the sequences travel to the experts, the attention of the second is
    computed; while those of the second travel, the experts of the first; then sums travel back likewise. The
    backward pass goes the same way in reverse (DualPipe, 2412.19437 section 3.2.1, inside one block). Balance
    counts the tokens of both. Where routing reads more than its own token a pass stays whole.
    """

    def forward(
        self, x_BSD: Tensor, context: Context, tokens: Tokens, mode: Mode, cache: LayerCache | None
    ) -> BlockResult:
        free = mode.training and mode.observer is None and mode.override is None
        if self.moe is None or not self.moe.divisible or not free or x_BSD.shape[0] < 2:
            return self.whole(x_BSD, context, tokens, mode, cache)
        assert cache is None, "training has no cache"
        return self._in_halves(self.moe, x_BSD, context, tokens, mode.at(self.moe.layer))

    def _in_halves(
        self, moe: MoELayer, x_BSD: Tensor, context: Context, tokens: Tokens, mode: LayerMode
    ) -> BlockResult:
        rows, length, middle = *x_BSD.shape[:2], x_BSD.shape[0] // 2
        halves: list[_Half] = []
        for begin, end in ((0, middle), (middle, rows)):
            attended = self.attend(x_BSD[begin:end], context.part(begin, end))
            normed_TD = self.feed_forward_norm(attended.y_BSD).flatten(0, 1)
            going = moe.send(normed_TD, tokens.part(begin * length, end * length), mode)
            halves.append(_Half(attended.y_BSD, attended.largest_H, going))
        coming = [moe.compute(half.going, mode) for half in halves]
        routing = Routing.joined([half.going.routing for half in halves])
        report = moe.balance(routing, tokens, mode)
        y_TD = torch.cat([moe.receive(sums) for sums in coming])
        x_BSD = torch.cat([half.x_BSD for half in halves])
        y_BSD = self.feed_forward_post_norm(y_TD.view_as(x_BSD))
        largest = [half.largest_H for half in halves if half.largest_H is not None]
        largest_H = reduce(torch.maximum, largest) if largest else None
        return BlockResult(x_BSD + y_BSD, routing, report, largest_H)
