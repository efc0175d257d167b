"""The two matrices over the vocabulary: what embeds tokens and what turns states into predictions of tokens.

Legend: B sequences, S tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from consilium.ops.loss import linear_cross_entropy
from consilium.ops.weights import Matrix, matrix_of


@dataclass(frozen=True, slots=True)
class Embed:
    """The row of each token: [B, S, D]."""

    ids_BS: Tensor
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Logits:
    """Products of states [..., D] with every row: float32 [..., V]."""

    hidden: Tensor


@dataclass(frozen=True, slots=True)
class NegativeLogLikelihood:
    """The sum of -log softmax(logits)[target], a float32 scalar in nats; a target of -1 counts for nothing.

    The logits of all tokens are never held at once.
    """

    hidden_BSD: Tensor
    targets_BS: Tensor


Question = Embed | Logits | NegativeLogLikelihood


@final
class Vocabulary(nn.Module):
    """A matrix ``weight`` [V, D]. One serves both ends of a model whose head is tied to its embedding.

    Every use goes through ``forward``: there, hooks that gather a sharded matrix fire.
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.register_buffer("weight_scales", None)
        self.weight_scales: Tensor | None

    @property
    def matrix(self) -> Matrix:
        return matrix_of(self.weight, self.weight_scales, self.hidden_size)

    def forward(self, question: Question) -> Tensor:
        match question:
            case Embed(ids_BS=ids_BS, dtype=dtype):
                return self.matrix.rows(ids_BS, dtype)
            case Logits(hidden=hidden):
                return self.matrix.times(hidden).float()
            case NegativeLogLikelihood(hidden_BSD=hidden_BSD, targets_BS=targets_BS):
                return linear_cross_entropy(hidden_BSD.flatten(0, 1), self.matrix, targets_BS.flatten())[0]
