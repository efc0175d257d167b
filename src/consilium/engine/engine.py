"""Batches of prompts decoded together against one cache.

Prompts are right-padded and computed in one pass; then every running sequence decodes one token a step at its
own position. Padding and finished rows take part in nothing.

Legend: B prompts, S tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from consilium.engine.request import Piece, Sampling
from consilium.engine.sampler import sample
from consilium.errors import ConsiliumError
from consilium.kv.build import build_cache
from consilium.kv.types import Cache
from consilium.model.decoder import Decoder
from consilium.model.types import Inputs, Options
from consilium.moe.types import Mode


class TextStream(Protocol):
    """Turns tokens into text that is never taken back."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


class TextCodec(Protocol):
    @property
    def eos_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def stream(self) -> TextStream: ...


@dataclass(slots=True)
class _Row:
    """One running sequence; owned by a single generate call."""

    index: int
    tokens: list[int]
    prompt: int
    generator: torch.Generator
    stream: TextStream | None
    text: str = ""
    finished: str | None = None


@final
class Engine:
    """Generates from a model. The first form: one batch a call; the cache lives as long as the call."""

    def __init__(self, model: Decoder, tokenizer: TextCodec | None = None, *, mode: Mode = Mode()) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.options = Options(mode=mode)

    def complete(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
    ) -> list[list[int]]:
        """Return the generated token ids of each prompt, end token and stop text included.

        ``generate`` has the finer settings of sampling.
        """
        outputs: list[list[int]] = [[] for _ in prompts]
        sampling = Sampling(temperature=temperature)
        for piece in self.generate(prompts, max_tokens=max_tokens, sampling=sampling, stop=stop):
            outputs[piece.request].append(piece.token)
        return outputs

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str],
        *,
        max_tokens: int = 64,
        sampling: Sampling = Sampling(),
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Stream pieces, step by step, in the order of the prompts.

        Raises ConsiliumError for an empty prompt, an id outside the vocabulary, text without a tokenizer, or
        a prompt that with ``max_tokens`` exceeds the model's length.
        """
        if stop and self.tokenizer is None:
            raise ConsiliumError("stop text needs a tokenizer; give Engine(model, tokenizer).")
        rows = [self._row(i, prompt, max_tokens, sampling) for i, prompt in enumerate(prompts)]
        if not rows or max_tokens <= 0:
            return
        weight = self.model.embed.weight
        capacity = max(len(row.tokens) for row in rows) + max_tokens
        cache = build_cache(
            self.model.config, batch=len(rows), capacity=capacity, dtype=weight.dtype, device=weight.device
        )
        logits = self._prefill(rows, cache)
        for _ in range(max_tokens):
            yield from self._advance(rows, logits, sampling, stop, max_tokens)
            if all(row.finished for row in rows):
                return
            logits = self._decode(rows, cache)

    def _row(self, index: int, prompt: Sequence[int] | str, max_tokens: int, sampling: Sampling) -> _Row:
        tokens = self._ids(prompt)
        config = self.model.config
        if not tokens:
            raise ConsiliumError(
                f"prompt {index} is empty; give at least one token (the end token starts a text)."
            )
        if min(tokens) < 0 or max(tokens) >= config.vocab_size:
            raise ConsiliumError(f"prompt {index} has a token id outside 0..{config.vocab_size - 1}.")
        if len(tokens) + max_tokens > config.max_length:
            raise ConsiliumError(
                f"prompt {index} of {len(tokens)} tokens with {max_tokens} new ones exceeds the model's"
                f" length {config.max_length}; shorten the prompt or lower --max-tokens."
            )
        generator = torch.Generator().manual_seed(sampling.seed)
        stream = None if self.tokenizer is None else self.tokenizer.stream()
        return _Row(index, list(tokens), len(tokens), generator, stream)

    def _ids(self, prompt: Sequence[int] | str) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ConsiliumError(
                "a text prompt needs a tokenizer; give token ids or Engine(model, tokenizer)."
            )
        return [self.tokenizer.eos_id, *self.tokenizer.encode(prompt)]

    @torch.inference_mode()
    def _prefill(self, rows: list[_Row], cache: Cache) -> Tensor:
        """[B, V] logits after each prompt's last token."""
        longest = max(len(row.tokens) for row in rows)
        ids_BS = torch.tensor([row.tokens + [0] * (longest - len(row.tokens)) for row in rows])
        lengths_B = torch.tensor([len(row.tokens) for row in rows])
        position_BS = torch.arange(longest).expand_as(ids_BS)
        inputs = Inputs(ids_BS, position_BS=position_BS, valid_BS=position_BS < lengths_B[:, None])
        hidden = self.model.hidden(inputs, cache=cache, options=self.options)
        return self.model.logits(hidden.final_BSD[torch.arange(len(rows)), lengths_B - 1])

    @torch.inference_mode()
    def _decode(self, rows: list[_Row], cache: Cache) -> Tensor:
        """[B, V] logits after each row's newest token; finished rows are padding."""
        inputs = Inputs(
            torch.tensor([[row.tokens[-1]] for row in rows]),
            position_BS=torch.tensor([[len(row.tokens) - 1] for row in rows]),
            valid_BS=torch.tensor([[row.finished is None] for row in rows]),
        )
        return self.model.logits(self.model.hidden(inputs, cache=cache, options=self.options).final_BSD[:, 0])

    def _advance(
        self, rows: list[_Row], logits_BV: Tensor, sampling: Sampling, stop: Sequence[str], max_tokens: int
    ) -> Iterator[Piece]:
        for row, logits_V in zip(rows, logits_BV, strict=True):
            if row.finished is None:
                token, logprob = sample(logits_V, sampling, row.generator)
                row.tokens.append(token)
                yield self._piece(row, token, logprob, stop, max_tokens)

    def _piece(self, row: _Row, token: int, logprob: float, stop: Sequence[str], max_tokens: int) -> Piece:
        ended = self.tokenizer is not None and token == self.tokenizer.eos_id
        text = "" if row.stream is None or ended else row.stream.push(token)
        row.text += text
        if ended or any(s in row.text for s in stop):
            row.finished = "stop"
        elif len(row.tokens) - row.prompt >= max_tokens:
            row.finished = "length"
        if row.finished is not None and row.stream is not None:
            text += row.stream.finish()
        return Piece(row.index, token, text, logprob, row.finished)
