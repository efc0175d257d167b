"""Multi-token prediction modules (DeepSeek-V3, 2412.19437 section 2.2).

Module k predicts token i + k + 2 from the representation of token i and the embedding of token i + k + 1
(k from 0). Embedding and head are the main model's; concatenation is [embedding; hidden], the released order.
The main model's representation enters after its last norm, as serving systems feed the released weights, and
module k hands its own on after its norm in the same way.

Legend: B sequences, S tokens, D hidden size, k module.
"""

from __future__ import annotations

import dataclasses
from typing import final

import torch
from torch import Tensor, nn

from consilium.attention.types import Context
from consilium.config.model import Model
from consilium.kv.types import Cache
from consilium.model.block import Block, Blocks, run_block
from consilium.model.types import BlockResult, Inputs, Objective, Options
from consilium.moe.types import Tokens
from consilium.ops.linear import Linear
from consilium.ops.loss import IGNORE
from consilium.ops.norm import RMSNorm


@final
class MTPModule(nn.Module):
    """Norms, the projection 2D -> D, one block and its last norm."""

    def __init__(self, config: Model, depth: int, blocks: Blocks = Block) -> None:
        super().__init__()
        size, epsilon = config.hidden_size, config.norm_epsilon
        self.embed_norm = RMSNorm(size, epsilon)
        self.hidden_norm = RMSNorm(size, epsilon)
        self.project = Linear(2 * size, size)
        self.block = blocks(config, config.layers + depth)
        self.norm = RMSNorm(size, epsilon)

    def forward(
        self,
        hidden_BSD: Tensor,
        embedded_BSD: Tensor,
        context: Context,
        tokens: Tokens,
        options: Options,
        cache: Cache | None = None,
    ) -> BlockResult:
        """Eq. 21 to 23: one projection of both normalised inputs, the block, and its states normalised."""
        x_BSD = self.project(self.joined(hidden_BSD, embedded_BSD))
        result = run_block(self.block, x_BSD, context, tokens, options, cache)
        return dataclasses.replace(result, x_BSD=self.norm(result.x_BSD))

    def joined(self, hidden_BSD: Tensor, embedded_BSD: Tensor) -> Tensor:
        """What is projected [..., 2D]."""
        return torch.cat((self.embed_norm(embedded_BSD), self.hidden_norm(hidden_BSD)), dim=-1)


def shift(values_BS: Tensor, by: int, fill: int) -> Tensor:
    """Move each row left by ``by`` tokens and fill its end."""
    tail_Bb = values_BS.new_full((values_BS.shape[0], min(by, values_BS.shape[1])), fill)
    return torch.cat((values_BS[:, by:], tail_Bb), dim=1)


def shifted(inputs: Inputs, by: int) -> Inputs:
    """Inputs that read token i + by at place i; valid where that token is in the same document."""
    ids_BS = inputs.ids_BS
    sequence_BS = torch.zeros_like(ids_BS) if inputs.sequence_BS is None else inputs.sequence_BS
    valid_BS = torch.ones_like(ids_BS, dtype=torch.bool) if inputs.valid_BS is None else inputs.valid_BS
    ahead_BS = (shift(sequence_BS, by, -1) == sequence_BS) & valid_BS & shift(valid_BS.long(), by, 0).bool()
    return Inputs(
        ids_BS=shift(ids_BS, by, 0),
        sequence_BS=inputs.sequence_BS,
        position_BS=inputs.position_BS,
        valid_BS=ahead_BS,
    )


def targets_ahead(objective: Objective, inputs: Inputs, module: int) -> Tensor:
    """What module ``module`` predicts, [B, S]: nothing where the token is in another document."""
    valid_BS = shifted(inputs, module + 1).valid_BS
    assert valid_BS is not None
    return shift(objective.targets_BS, module + 1, IGNORE).masked_fill(~valid_BS, IGNORE)
