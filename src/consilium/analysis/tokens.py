"""Which experts each token of a text uses.

Legend: T tokens of a pass, K most experts that a token may use.
"""

from __future__ import annotations

from typing import Final, final

import torch

from consilium.data.corpus import Corpus
from consilium.data.loader import held_out_batches
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError
from consilium.model.decoder import Decoder
from consilium.model.types import Inputs, Options
from consilium.moe.types import Activations, Mode, Routing, Tokens
from consilium.ops.rows import Rows
from consilium.records.tokens import ReadPassage, TokensRead, Used

MOST_TOKENS: Final = 1024
"""What a person looks at, of all domains together."""
_LONGEST: Final = 256
"""Tokens of a passage."""


@torch.no_grad()
def observe_tokens(model: Decoder, corpus: Corpus, name: str) -> TokensRead:
    """Read some of each domain and keep what the tokens used, under the ``name`` of the model.

    Raises ConsiliumError for a model without experts.
    """
    moe = model.config.moe
    if moe is None:
        raise ConsiliumError(f"{name} is dense: its tokens use no experts; give a sparse model.")
    device = next(model.parameters()).device
    passages: list[ReadPassage] = []
    layers: tuple[int, ...] = ()
    for domain in corpus.domains:
        limit = max(MOST_TOKENS // len(corpus.domains), 1)
        length = min(_LONGEST, model.config.max_length, limit)
        for labelled in held_out_batches(corpus, domain, length, 1, limit_tokens=limit):
            seen = _Seen()
            inputs = Inputs.of(labelled.batch.to(device))
            model.hidden(inputs, options=Options(mode=Mode(observer=seen)))
            layers = tuple(sorted(seen.used))
            pieces = pieces_of(corpus.tokenizer, labelled.batch.ids_BS[0].tolist())
            used = tuple(seen.used[layer] for layer in layers)
            passages.append(ReadPassage(domain=domain, pieces=pieces, used=used))
    return TokensRead(model=name, experts=moe.experts, layers=layers, passages=tuple(passages))


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, ...]:
    """The text of each token; joined they are the text of all."""
    stream = tokenizer.stream(opens=True)
    pieces = [stream.push(token) for token in ids]
    return (*pieces[:-1], pieces[-1] + stream.finish()) if pieces else ()


@final
class _Seen:
    """An Observer of one pass without padding."""

    def __init__(self) -> None:
        self.used: dict[int, Used] = {}

    def routing(self, layer: int, routing: Routing, tokens: Tokens) -> None:
        order_TK = routing.weights_TK.masked_fill(~routing.keep_TK, -1.0).argsort(
            dim=1, descending=True, stable=True
        )
        experts_TK = routing.experts_TK.gather(1, order_TK).tolist()
        counts_T = routing.keep_TK.sum(1).tolist()
        self.used[layer] = tuple(
            tuple(experts[:count]) for experts, count in zip(experts_TK, counts_T, strict=True)
        )

    def rows(self, layer: int, rows: Rows, activations: Activations) -> None:
        """Not needed here."""
