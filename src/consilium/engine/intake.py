"""What is taken of a request: the tokens of its prompt, how long it may become, and what ends it.

Legend: V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, final

import torch
from torch import Tensor

from consilium.config.model import Model
from consilium.engine.batch import PAGE
from consilium.engine.request import Request
from consilium.engine.rows import Row, TextStream
from consilium.engine.stops import StopText
from consilium.errors import ConsiliumError
from consilium.model.decoder import Decoder


class TextCodec(Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def eos_id(self) -> int: ...

    @property
    def opening_id(self) -> int | None: ...

    @property
    def known_ids(self) -> Collection[int]:
        """Ids that mean something: no others are drawn."""
        ...

    @property
    def markers(self) -> Mapping[str, int]:
        """Tokens that stand for no text, by their names."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def stream(self) -> TextStream: ...


@final
@dataclass(frozen=True, slots=True)
class Intake:
    """Checks requests for one model; nothing of it changes, so that any thread may ask."""

    tokenizer: TextCodec | None
    config: Model
    length: int
    """Tokens of a sequence at most, prompt and answer."""
    most_tokens: int | None
    """Of all sequences, where the cache does not grow."""
    ends: tuple[int, ...]
    meaningless_V: Tensor | None
    """Bool; ids that no draw may give."""

    @classmethod
    def of(
        cls, model: Decoder, tokenizer: TextCodec | None, length: int | None, most_tokens: int | None
    ) -> Self:
        """Raises ConsiliumError for a tokenizer that is larger than the model's vocabulary."""
        config, ends, meaningless_V = model.config, model.generation.ends, None
        if tokenizer is not None:
            ends = ends or (tokenizer.eos_id,)
            meaningless_V = _meaningless(tokenizer.known_ids, ends, config.vocab_size)
        return cls(
            tokenizer,
            config,
            min(config.max_length, length or config.max_length),
            None if most_tokens is None else most_tokens // PAGE * PAGE,
            ends,
            meaningless_V,
        )

    def check(self, request: Request, name: str) -> list[int]:
        """Return the tokens of its prompt; raises ConsiliumError that calls it ``name``."""
        if request.stop and self.tokenizer is None:
            raise ConsiliumError("stop text needs a tokenizer; give Engine(model, tokenizer).")
        tokens = self._ids(request.prompt)
        self._check_prompt(name, tokens, request.max_tokens)
        if request.steering is not None:
            request.steering.check(self.config, len(tokens), name)
        for token, _ in request.sampling.logit_bias:
            if not 0 <= token < self.config.vocab_size:
                raise ConsiliumError(
                    f"logit_bias names token {token}, which is outside 0..{self.config.vocab_size - 1};"
                    " leave it out."
                )
        return tokens

    def row(self, number: int, request: Request, tokens: list[int]) -> Row:
        longest = min(self.length, self.most_tokens or self.length)
        new = longest if request.max_tokens is None else request.max_tokens
        return Row(
            id=number,
            request=request,
            tokens=tokens,
            prompt=len(tokens),
            most=min(len(tokens) + new, longest),
            ends=frozenset(self.ends if request.stop_ids is None else request.stop_ids),
            generator=_stream(request.sampling.seed, request.sample),
            stream=None if self.tokenizer is None else self.tokenizer.stream(),
            stops=StopText(request.stop),
            markers=frozenset(() if self.tokenizer is None else self.tokenizer.markers.values()),
            matching=None if request.constraint is None else request.constraint.begin(),
        )

    def _check_prompt(self, name: str, tokens: list[int], max_tokens: int | None) -> None:
        if not tokens:
            raise ConsiliumError(f"{name} is empty; give at least one token (the end token starts a text).")
        if min(tokens) < 0 or max(tokens) >= self.config.vocab_size:
            raise ConsiliumError(f"{name} has a token id outside 0..{self.config.vocab_size - 1}.")
        if len(tokens) + (1 if max_tokens is None else max_tokens) > self.length:
            new = "" if max_tokens is None else f" with {max_tokens} new ones"
            raise ConsiliumError(
                f"{name} of {len(tokens)} tokens{new} exceeds the model's length {self.length};"
                " shorten the prompt or lower --max-tokens."
            )
        if self.most_tokens is not None and len(tokens) + (max_tokens or 1) > self.most_tokens:
            raise ConsiliumError(
                f"{name} of {len(tokens)} tokens with {max_tokens or 1} new ones exceeds the"
                f" {self.most_tokens} tokens of the cache; shorten it, or give the engine more most_tokens."
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


def _meaningless(known: Collection[int], ends: Collection[int], size: int) -> Tensor | None:
    """Bool [V] of ids that neither tokenizer nor ends have, or None; on the CPU, where tokens are drawn."""
    if max(known) >= size:
        raise ConsiliumError(
            f"the tokenizer has token {max(known)} but the model's vocabulary ends at {size - 1}; give the"
            " tokenizer that the model was trained with."
        )
    meaningless_V = torch.ones(size, dtype=torch.bool, device="cpu")
    named = [token for token in {*known, *ends} if token < size]
    meaningless_V[torch.tensor(sorted(named), device="cpu")] = False
    return meaningless_V if meaningless_V.any() else None


def _stream(seed: int, occurrence: int) -> torch.Generator:
    """The randomness of one sample, from the seed and the number of equal prompts before it."""
    digest = hashlib.sha256(f"{seed}/{occurrence}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
