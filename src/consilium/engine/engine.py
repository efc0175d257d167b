"""Batches of prompts decoded together against one cache.

Prompts are right-padded and computed in one pass; then every running sequence decodes one token a step at its
own position. Padding and finished rows take part in nothing, and no token's routing sees another row. Greedy
tokens are those of each prompt alone; logits are not, to the last bit: the size of a matrix product decides
how it rounds, so that two logits closer than that may change places.

Legend: B prompts, S tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, final

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

_T = TypeVar("_T")


class TextStream(Protocol):
    """Turns tokens into text that is never taken back."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


class TextCodec(Protocol):
    @property
    def eos_id(self) -> int: ...

    @property
    def opening_id(self) -> int | None: ...

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
    """Generates from a model on its own device; one batch a call, and the cache lives as long as the call.

    Raises ConsiliumError for a model without weights, or one whose experts choose among the tokens at hand or
    always drop beyond a capacity: neighbours and the cache would change its text.
    """

    def __init__(self, model: Decoder, tokenizer: TextCodec | None = None, *, mode: Mode = Mode()) -> None:
        _check(model)
        self.model = model.eval()
        self.device = model.embed.weight.device
        self.tokenizer = tokenizer
        self.options = Options(mode=mode)

    def complete(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str] | str,
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] | str = (),
    ) -> list[list[int]]:
        """Return the generated token ids of each prompt, end token and stop text included.

        One text is one prompt. With a temperature, the same prompt n times gives n samples, which ``seed``
        repeats. ``generate`` has the finer settings of sampling and the errors of both.
        """
        outputs: list[list[int]] = [[] for _ in _listed(prompts)]
        sampling = Sampling(temperature=temperature, seed=seed)
        for piece in self.generate(prompts, max_tokens=max_tokens, sampling=sampling, stop=stop):
            outputs[piece.request].append(piece.token)
        return outputs

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str] | str,
        *,
        max_tokens: int = 64,
        sampling: Sampling = Sampling(),
        stop: Sequence[str] | str = (),
    ) -> Iterator[Piece]:
        """Stream pieces, step by step, in the order of the prompts; one text is one prompt or one stop.

        Raises ConsiliumError for an empty prompt or stop, an id outside the vocabulary, text without a
        tokenizer, or a prompt that with ``max_tokens`` exceeds the model's length.
        """
        stop = _listed(stop)
        if stop and self.tokenizer is None:
            raise ConsiliumError("stop text needs a tokenizer; give Engine(model, tokenizer).")
        if "" in stop:
            raise ConsiliumError("a stop text is empty and would end every answer at once; leave it out.")
        rows = self._rows(_listed(prompts), max_tokens, sampling)
        if not rows or max_tokens <= 0:
            return
        capacity, dtype = max(len(row.tokens) for row in rows) + max_tokens, self.model.embed.weight.dtype
        cache = build_cache(
            self.model.config, batch=len(rows), capacity=capacity, dtype=dtype, device=self.device
        )
        logits = self._prefill(rows, cache)
        for _ in range(max_tokens):
            yield from self._advance(rows, logits, sampling, stop, max_tokens)
            if all(row.finished for row in rows):
                return
            logits = self._decode(rows, cache)

    def _rows(
        self, prompts: Sequence[Sequence[int] | str], max_tokens: int, sampling: Sampling
    ) -> list[_Row]:
        rows: list[_Row] = []
        equal = Counter[tuple[int, ...]]()
        for index, prompt in enumerate(prompts):
            tokens = self._ids(prompt)
            self._check_prompt(index, tokens, max_tokens)
            generator = _stream(sampling.seed, equal[tuple(tokens)])
            equal[tuple(tokens)] += 1
            text = None if self.tokenizer is None else self.tokenizer.stream()
            rows.append(_Row(index, tokens, len(tokens), generator, text))
        return rows

    def _check_prompt(self, index: int, tokens: list[int], max_tokens: int) -> None:
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

    def _ids(self, prompt: Sequence[int] | str) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ConsiliumError(
                "a text prompt needs a tokenizer; give token ids or Engine(model, tokenizer)."
            )
        opening = self.tokenizer.opening_id
        return [*(() if opening is None else (opening,)), *self.tokenizer.encode(prompt)]

    @torch.inference_mode()
    def _prefill(self, rows: list[_Row], cache: Cache) -> Tensor:
        """[B, V] logits after each prompt's last token."""
        longest = max(len(row.tokens) for row in rows)
        ids_BS = self._tensor([row.tokens + [0] * (longest - len(row.tokens)) for row in rows])
        lengths_B = self._tensor([len(row.tokens) for row in rows])
        position_BS = torch.arange(longest, device=self.device).expand_as(ids_BS)
        inputs = Inputs(ids_BS, position_BS=position_BS, valid_BS=position_BS < lengths_B[:, None])
        hidden = self.model.hidden(inputs, cache=cache, options=self.options)
        rows_B = torch.arange(len(rows), device=self.device)
        return self.model.logits(hidden.final_BSD[rows_B, lengths_B - 1])

    @torch.inference_mode()
    def _decode(self, rows: list[_Row], cache: Cache) -> Tensor:
        """[B, V] logits after each row's newest token; finished rows are padding."""
        inputs = Inputs(
            self._tensor([[row.tokens[-1]] for row in rows]),
            position_BS=self._tensor([[len(row.tokens) - 1] for row in rows]),
            valid_BS=self._tensor([[row.finished is None] for row in rows]),
        )
        return self.model.logits(self.model.hidden(inputs, cache=cache, options=self.options).final_BSD[:, 0])

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """int64, or bool for bools, on the model's device."""
        return torch.tensor(values, device=self.device)

    def _advance(
        self, rows: list[_Row], logits_BV: Tensor, sampling: Sampling, stop: Sequence[str], max_tokens: int
    ) -> Iterator[Piece]:
        # Streams draw on the CPU, so that a seed means the same on every device.
        for row, logits_V in zip(rows, logits_BV.cpu(), strict=True):
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


def _check(model: Decoder) -> None:
    moe = model.config.moe
    if model.embed.weight.is_meta:
        raise ConsiliumError("a model on the meta device has no weights to generate from; load or build one.")
    if moe is not None and not moe.independent:
        raise ConsiliumError(
            "the text of this model would depend on the batch, because its experts choose among the tokens at"
            " hand or always drop beyond a capacity; change moe.router.select, or use scope 'training'."
        )


def _listed(texts: Sequence[_T] | str) -> Sequence[_T | str]:
    """A text is a sequence of characters in Python: here it is one text."""
    return (texts,) if isinstance(texts, str) else texts


def _stream(seed: int, occurrence: int) -> torch.Generator:
    """The randomness of one sample, from the seed and the number of equal prompts before it."""
    digest = hashlib.sha256(f"{seed}/{occurrence}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
