"""One sequence: what it is made of, and how logits become its next token and text.

Legend: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from consilium.engine.request import Finish, Matching, Piece, Request, Scored
from consilium.engine.routes import Routes
from consilium.engine.sampler import likeliest, sample
from consilium.engine.stops import StopText
from consilium.errors import ConsiliumError


class TextStream(Protocol):
    """Turns tokens into text that is never taken back."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


@dataclass(slots=True, eq=False)
class Row:
    """One sequence, waiting or running; owned by the engine."""

    id: int
    request: Request
    tokens: list[int]
    prompt: int
    """How many of ``tokens`` were given."""
    most: int
    """How many ``tokens`` there can be."""
    ends: frozenset[int]
    generator: torch.Generator
    stream: TextStream | None
    stops: StopText
    markers: frozenset[int] = frozenset()
    """Tokens that are no text: no stop text reaches across one."""
    finished: Finish | None = None
    pages: list[int] = field(default_factory=list)
    """Of its tokens; none while it waits for its turn."""
    cached: int = 0
    """How many of ``tokens`` are in the cache. Beyond the prompt those that are not are decoded anew."""
    parts: tuple[bytes, ...] = ()
    """Digests of the whole parts of its prompt."""
    scored: list[Scored] = field(default_factory=list)
    """Tokens of its prompt, where that was asked for."""
    matching: Matching | None = None
    """Of its answer so far, where that has to have a form."""
    pooled: Tensor | None = None
    """float32 [D] of what was read of its prompt, where that was asked for."""
    routes: list[Routes] = field(default_factory=list)
    """Of tokens that were computed since the last piece, where that was asked for."""
    routed: int = 0
    """Tokens whose routes were taken down."""
    shared: int | None = None
    """Tokens of its prompt that were in the cache when it joined first; None before."""
    states: tuple[int, Tensor] | None = None
    """Where tokens are guessed by modules: a place, and the states [S, D] of the tokens from there on."""

    def settled(self) -> tuple[int, Tensor]:
        """Of ``states``, those of tokens that stayed."""
        assert self.states is not None, "its prompt is read"
        first, states_SD = self.states
        return first, states_SD[: self.cached - first]

    def tell(self, place: int, routes: Routes | None) -> None:
        """Take down where the tokens from ``place`` on went, but for those of which that is known."""
        if routes is None or not self.request.routes:
            return
        known = max(self.routed - place, 0)  # of a row that is computed again
        if known < routes.tokens:
            self.routes.append(routes.part(known, routes.tokens))
            self.routed = place + routes.tokens


def _fitting(matching: Matching, ends: frozenset[int]) -> Tensor:
    """Bool [V]: what may follow; an end is one where the form may."""
    allowed_V = matching.allowed()
    known = [token for token in ends if token < len(allowed_V)]
    allowed_V[torch.tensor(known, dtype=torch.int64)] = matching.may_end
    if not bool(allowed_V.any()):
        raise ConsiliumError("the form of the answer cannot be kept from here on.")
    return allowed_V


def pool(row: Row, final_SD: Tensor) -> None:
    """Add a part of the prompt to what is pooled of it."""
    own_D = final_SD[-1].float() if row.request.pools == "last" else final_SD.float().sum(0)
    first = row.pooled is None or row.request.pools == "last"
    row.pooled = own_D if first or row.pooled is None else row.pooled + own_D


def pooled(row: Row) -> Piece:
    """All that is told of a request that is pooled. Raises ConsiliumError for states that are no numbers."""
    assert row.pooled is not None, "its prompt is read"
    state_D = row.pooled / row.pooled.norm().clamp(min=torch.finfo(torch.float32).tiny)
    if not bool(state_D.isfinite().all()):
        raise ConsiliumError("the model's states are not finite; load it in float32 or bfloat16.")
    row.finished = "stop"
    return Piece(row.id, row.tokens[-1], "", 0.0, "stop", state=tuple(state_D.tolist()))


def advance(row: Row, logits_V: Tensor, meaningless_V: Tensor | None) -> Piece:
    """Give a row its next token; what is ``meaningless_V`` is never drawn.

    Greedy text is what the model says, also where its tokenizer has no word for it. Raises ConsiliumError for
    logits that are no numbers.
    """
    request, given = row.request, len(row.tokens) == row.prompt
    drawn_V = logits_V
    if meaningless_V is not None and request.sampling.temperature > 0:
        drawn_V = drawn_V.masked_fill(meaningless_V, -torch.inf)
    if (matching := row.matching) is not None:
        drawn_V = drawn_V.masked_fill(~_fitting(matching, row.ends), -torch.inf)
    token, logprob = sample(drawn_V, request.sampling, row.generator, row.tokens, row.prompt)
    row.tokens.append(token)
    ended = token in row.ends
    if matching is not None and not ended:
        matching.accept(token)
    text = "" if row.stream is None or ended else row.stops.push(row.stream.push(token))
    if token in row.markers:
        text += row.stops.finish()
    if ended or row.stops.found or (matching is not None and matching.is_over):
        row.finished = "stop"
    elif len(row.tokens) >= row.most:
        row.finished = "length"
    if row.finished is not None and row.stream is not None:
        text += row.stops.push(row.stream.finish()) + row.stops.finish()
    return Piece(
        request=row.id,
        token=token,
        text=text,
        logprob=logprob,
        finished=row.finished,
        top=likeliest(torch.log_softmax(logits_V.float(), dim=-1), request.top) if request.top else (),
        prompt=tuple(row.scored) if given else (),
        routes=_joined(row),
        cached=row.shared or 0,
    )


def _joined(row: Row) -> Routes | None:
    """Take what is there of routes."""
    if not row.routes:
        return None
    parts, row.routes = row.routes, []
    return Routes.joined(parts)
