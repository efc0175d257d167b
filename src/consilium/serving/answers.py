"""From pieces of the engine to objects of the API. Nothing here waits or knows a connection."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, final

from torch import Tensor

from consilium.engine.request import Finish, Piece, Scored, Top

LOWEST: Final = -9999.0
"""Minus infinity is no number of JSON; this is what vLLM writes."""

Kind = Literal["text_completion", "chat.completion"]


class Words(Protocol):
    """What an answer needs of a tokenizer."""

    @property
    def markers(self) -> Mapping[str, int]: ...

    @property
    def known_ids(self) -> Collection[int]: ...

    def decode_bytes(self, tokens: Iterable[int]) -> bytes: ...


@final
class Spelling:
    """How single tokens are written, each otherwise than the others."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._names = {token: name for name, token in words.markers.items()}
        self._with_more: dict[str, tuple[tuple[int, str], ...]] = {}

    def data(self, token: int) -> bytes:
        return self._words.decode_bytes([token])

    def text(self, token: int) -> str:
        """Its text, its bytes where they are only a part of a character, or the name of what has none."""
        data = self.data(token)
        if not data:
            return self._names.get(token, f"token_id:{token}")
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def name(self, token: int) -> str:
        """That of a token without text; '' for any other."""
        return self._names.get(token, "") if token >= 0 and not self.data(token) else ""

    def named(self, text: str, below: int) -> tuple[int, ...]:
        """The marker that is written so, if there is one and it is ``below``."""
        token = self._words.markers.get(text, below)
        return (token,) if token < below else ()

    def with_more(self, mark: str) -> tuple[tuple[int, str], ...]:
        """Tokens that go on behind a ``mark`` with what is no blank; they are looked for once."""
        if mark not in self._with_more:
            known = ((token, self.text(token)) for token in self._words.known_ids)
            self._with_more[mark] = tuple(
                (token, text) for token, text in known if text.partition(mark)[2].strip()
            )
        return self._with_more[mark]


@final
@dataclass(frozen=True, slots=True)
class Heading:
    """What all objects of one answer begin with."""

    kind: Kind
    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def object(self, choices: Sequence[Mapping[str, Any]], *, streamed: bool = False) -> dict[str, Any]:
        chat = self.kind == "chat.completion"
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.id}",
            "object": f"{self.kind}.chunk" if chat and streamed else self.kind,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
        }


@final
@dataclass(slots=True)
class Answer:
    """One sequence, from its prompt to the piece that ends it."""

    prompt: Sequence[int]
    pieces: list[Piece] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self) -> Finish | None:
        return self.pieces[-1].finished if self.pieces else None

    @property
    def likelihood(self) -> float:
        """The mean of its tokens, by which the best of several is chosen."""
        return sum(piece.logprob for piece in self.pieces) / max(len(self.pieces), 1)


def usage(answers: Sequence[Answer], prompts: int, *, silent: bool = False) -> dict[str, Any]:
    """Tokens of the first ``prompts`` answers' prompts, one of each, and of all answers."""
    each = len(answers) // prompts
    given = sum(len(answer.prompt) for answer in answers[::each])
    new = 0 if silent else sum(len(answer.pieces) for answer in answers)
    cached = sum(answer.pieces[0].cached for answer in answers[::each] if answer.pieces)
    return {
        "prompt_tokens": given,
        "completion_tokens": new,
        "total_tokens": given + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST


Told = tuple[int, float | None, Top]
"""A token, how likely it was, and what was likelier."""


def told(pieces: Iterable[Piece | Scored]) -> list[Told]:
    return [(piece.token, piece.logprob, piece.top) for piece in pieces]


def completion_logprobs(tokens: Sequence[Told], spelling: Spelling, offset: int = 0) -> dict[str, Any]:
    """As completions have them; ``offset`` is where the first token's text begins."""
    texts = [spelling.text(token) for token, _, _ in tokens]
    offsets = [offset]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [None if logprob is None else finite(logprob) for _, logprob, _ in tokens],
        "top_logprobs": [_by_text(one, spelling) for one in tokens],
        "text_offset": offsets[:-1],
    }


def _by_text(one: Told, spelling: Spelling) -> dict[str, float] | None:
    """The likeliest tokens and the one that came, by their texts; of two with one text the likelier."""
    token, logprob, top = one
    if logprob is None:
        return None
    found: dict[str, float] = {}
    for other, likelihood in (*top, (token, logprob)):
        found.setdefault(spelling.text(other), finite(likelihood))
    return found


def prompt_told(prompt: Sequence[int], spelling: Spelling) -> dict[str, Any]:
    """Tokens of a prompt as the model read it, template included, and how each is written."""
    return {
        "prompt_token_ids": list(prompt),
        "prompt_token_strs": [spelling.text(token) for token in prompt],
    }


def routed(pieces: Iterable[Piece], *, begins: bool) -> dict[str, Any]:
    """Experts and weights of tokens [T, M, K], a token's as soon as it is computed: the last has none.

    Of pieces that begin an answer the first tells those of the prompt.
    """
    routes = [piece.routes for piece in pieces]
    told: dict[str, Any] = {}
    if begins and routes and (prompt := routes.pop(0)) is not None:
        told["routed_layers"] = list(prompt.layers)
        told["prompt_routed_experts"] = prompt.experts_TMK.tolist()
        told["prompt_routed_weights"] = _rounded(prompt.weights_TMK)
        told["prompt_runner_up_experts"] = prompt.seconds_TM.tolist()
        told["prompt_routed_margins"] = _rounded(prompt.margins_TM)
    own = [one for one in routes if one is not None]
    told["routed_experts"] = [token for one in own for token in one.experts_TMK.tolist()]
    told["routed_weights"] = [token for one in own for token in _rounded(one.weights_TMK)]
    told["runner_up_experts"] = [token for one in own for token in one.seconds_TM.tolist()]
    told["routed_margins"] = [token for one in own for token in _rounded(one.margins_TM)]
    return told


def _rounded(values: Tensor) -> list[Any]:
    """To five places, as many as a reader wants."""
    return values.double().mul(1e5).round().div(1e5).tolist()


def chat_logprobs(tokens: Sequence[Told], spelling: Spelling) -> dict[str, Any]:
    return {
        "content": [
            _entry(token, logprob, spelling) | {"top_logprobs": [_entry(*other, spelling) for other in top]}
            for token, logprob, top in tokens
            if logprob is not None
        ],
        "refusal": None,
    }


def _entry(token: int, logprob: float, spelling: Spelling) -> dict[str, Any]:
    return {
        "token": spelling.text(token),
        "logprob": finite(logprob),
        "bytes": list(spelling.data(token)),
    }
