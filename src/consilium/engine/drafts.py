"""Tokens that are guessed, so that one pass computes several of a sequence.

A guess changes no token: each is drawn behind those before it as it would be without, and what was guessed
from the first wrong one on is forgotten. Greedy and seeded text is the same, and only its speed is another.

Legend: N tokens of a pass, S of one sequence, D hidden size, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, final

import torch
from torch import Tensor

from consilium.config.model import Model
from consilium.engine.rows import Row
from consilium.errors import ConsiliumError
from consilium.kv.types import Cache
from consilium.model.decoder import Decoder
from consilium.model.native import NativeDecoder, NativeModule
from consilium.model.types import Inputs, Options


@dataclass(frozen=True, slots=True)
class NGrams:
    """Guess what followed when the last tokens were there before, in the prompt or the answer."""

    tokens: int = 4
    """Guessed at most for a pass."""

    def __post_init__(self) -> None:
        _check(self.tokens)


@dataclass(frozen=True, slots=True)
class Ahead:
    """Guess with the model's own multi-token prediction modules (2412.19437 section 2.2)."""

    tokens: int = 1
    """Beyond the depth of the model its last module guesses on from what it guessed."""

    def __post_init__(self) -> None:
        _check(self.tokens)


Speculation = NGrams | Ahead


MOST_GUESSED: Final = 16
"""At once: a pass computes them all, and few of so many are right."""


def _check(tokens: int) -> None:
    if not 1 <= tokens <= MOST_GUESSED:
        raise ConsiliumError(f"{tokens} tokens cannot be guessed at once; use 1 to {MOST_GUESSED}.")


def check_speculation(config: Model, speculation: Speculation | None) -> None:
    """Raises ConsiliumError for a model that has no modules to guess with."""
    if isinstance(speculation, Ahead) and not config.mtp.depth:
        raise ConsiliumError(
            "this model has no multi-token prediction modules to guess with; speculate by n-grams."
        )


class Drafts(Protocol):
    """Guesses for rows between two passes."""

    def read(self, row: Row, first: int, final_SD: Tensor) -> None:
        """Hear of a part of a prompt, from token ``first`` on: its states after the last norm."""
        ...

    def guess(self, rows: Sequence[Row], most: Sequence[int]) -> list[list[int]]:
        """At most so many tokens for each row, behind those that it has."""
        ...


LONGEST: Final = 4
SHORTEST: Final = 2


@final
class Repeats:
    """Finds the last tokens where they stood before."""

    def read(self, row: Row, first: int, final_SD: Tensor) -> None:
        """Nothing is to be learnt: the tokens are there."""

    def guess(self, rows: Sequence[Row], most: Sequence[int]) -> list[list[int]]:
        return [repeated(row.tokens, count) if count else [] for row, count in zip(rows, most, strict=True)]


def repeated(tokens: Sequence[int], most: int) -> list[int]:
    """What followed the last place where the last tokens stood, as many of them as did; else nothing.

    Where that place reaches into the last tokens, the text runs in a circle, and the guess runs on in it.
    """
    numbers = array("i", tokens)
    data, size = numbers.tobytes(), numbers.itemsize
    for length in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        end = len(data) - 1
        while (found := data.rfind(data[-length * size :], 0, end)) >= 0:
            if found % size == 0:
                followed = tokens[found // size + length :]
                return [followed[place % len(followed)] for place in range(most)]
            end = found + length * size - 1
    return []


@dataclass(slots=True)
class _Trail:
    """A sequence on its way through the modules."""

    row: Row
    tokens: list[int]
    """With what was guessed."""
    first: int
    states_SD: Tensor
    """Of the tokens from ``first`` on, what the next module reads."""

    @property
    def places(self) -> range:
        return range(self.first, self.first + len(self.states_SD))

    def step(self) -> None:
        """Go on from the last token alone to the one that was guessed behind it."""
        self.first += len(self.states_SD)
        self.states_SD = self.states_SD[-1:]


PartOf = Callable[[Sequence[Row]], Cache]


@final
class Modules:
    """Runs multi-token prediction modules behind the model, over cached rows of their own.

    Beyond the first module, the row of a token whose next ones were guessed wrongly stays as it is: nothing
    comes of it but guesses.
    """

    def __init__(self, model: Decoder, native: NativeDecoder | None, options: Options, part: PartOf) -> None:
        self._model = model
        self._decoder = native
        self._native = [
            None if native is None else NativeModule.of(module, native) for module in model.modules_ahead
        ]
        self._options = options
        self._part = part

    @property
    def _depth(self) -> int:
        return len(self._native)

    def read(self, row: Row, first: int, final_SD: Tensor) -> None:
        """Module k reads each token with the one k + 1 behind it, as far as that is known."""
        trail = _Trail(row, row.tokens, first, final_SD)
        for k in range(self._depth):
            trail.states_SD = trail.states_SD[: max(len(row.tokens) - first - k - 1, 0)]
            if not trail.places:
                break
            trail.states_SD = self._pass(k, [trail], many=True)
        kept_SD = final_SD[-self._depth :]
        row.states = first + len(final_SD) - len(kept_SD), kept_SD

    @torch.inference_mode()
    def guess(self, rows: Sequence[Row], most: Sequence[int]) -> list[list[int]]:
        """The likeliest tokens. All rows pass the first module, lest it lack what they computed since."""
        trails = [_Trail(row, list(row.tokens), *row.settled()) for row in rows]
        for k in range(max(1, *most)):
            going = [t for t, count in zip(trails, most, strict=True) if t.places and k < max(count, 1)]
            for trail in going if k >= self._depth else ():
                trail.step()
            if going:
                self._go_on(min(k, self._depth - 1), going)
        guessed = [trail.tokens[len(trail.row.tokens) :] for trail in trails]
        return [tokens[:count] for tokens, count in zip(guessed, most, strict=True)]

    def _go_on(self, k: int, trails: Sequence[_Trail]) -> None:
        """One more token for each."""
        parts = self._pass(k, trails, many=False).split([len(trail.places) for trail in trails])
        logits_BV = self._logits(torch.stack([part_SD[-1] for part_SD in parts]))
        for trail, part_SD, token in zip(trails, parts, logits_BV.argmax(-1).tolist(), strict=True):
            trail.states_SD = part_SD
            trail.tokens.append(token)

    def _pass(self, k: int, trails: Sequence[_Trail], *, many: bool) -> Tensor:
        """States [N, D] of module ``k``; ``many`` are those of one sequence, else each is one of its own."""
        shape = (1, -1) if many else (-1, 1)
        places = torch.tensor([i for trail in trails for i in trail.places], device=self._model.device)
        ids = places.new_tensor([trail.tokens[i + k + 1] for trail in trails for i in trail.places])
        inputs = Inputs(ids.view(shape), position_BS=places.view(shape))
        part = self._part([t.row for t in trails] if many else [t.row for t in trails for _ in t.places])
        hidden_ND = torch.cat([trail.states_SD for trail in trails])
        native = self._native[k]
        if native is not None:
            embedded_ND = self._model.embedded(inputs.ids_BS, self._options).flatten(0, 1)
            return native.states(hidden_ND, embedded_ND, inputs, part, self._options, many=many)
        hidden_BSD = hidden_ND.to(self._model.dtype).view(*inputs.ids_BS.shape, -1)
        return self._model.module(k, hidden_BSD, inputs, self._options, part).x_BSD.flatten(0, 1)

    def _logits(self, final_BD: Tensor) -> Tensor:
        if self._decoder is not None:
            return self._decoder.vocabulary(final_BD.float())
        return self._model.logits(final_BD[None])[0]
