"""Texts from outside that spell a marker and must not become one: a private character goes into them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from consilium.data.forms import Message

_NONCHARACTERS: Final = (*map(chr, range(0xFDD0, 0xFDF0)), *map(chr, range(0xE000, 0xF900)))
"""Never exchanged between programs (Unicode 23.7); then private ones, should a text have them all."""
_THOUGHT: Final = re.compile(r"</?think(ing)?>")
"""What a model may write itself: templates cut earlier thoughts out by it."""


def unused(text: str) -> Iterator[str]:
    """Characters that are nowhere in ``text``."""
    return (character for character in _NONCHARACTERS if character not in text)


def guarded(message: Message, markers: Mapping[str, int], guard: str) -> dict[str, Any]:
    """The message with ``guard`` inside all that is a marker or may become one beside the template's text."""
    role = message.role if message.role.isidentifier() else _guard(message.role, markers, guard)
    own = {marker for marker in markers if message.role == "assistant" and _THOUGHT.fullmatch(marker)}
    foreign = {marker: index for marker, index in markers.items() if marker not in own}
    told: dict[str, Any] = {"role": role, "content": _guard(message.content, foreign, guard)}
    if message.calls:
        calls = [{"name": call.name, "arguments": call.arguments} for call in message.calls]
        guarded = guarded_value(calls, foreign, guard)
        told["tool_calls"] = [
            {"id": call.id, "type": "function", "function": function}
            for call, function in zip(message.calls, guarded, strict=True)
        ]
    if message.answers is not None:
        told["tool_call_id"] = _guard(message.answers, foreign, guard)
    return told


def guarded_value(value: Any, markers: Mapping[str, int], guard: str) -> Any:
    """A value of JSON, all texts in it guarded."""
    match value:
        case str():
            return _guard(value, markers, guard)
        case Mapping():
            return {
                _guard(str(name), markers, guard): guarded_value(one, markers, guard)
                for name, one in value.items()
            }
        case list() | tuple():
            return [guarded_value(one, markers, guard) for one in value]
        case _:
            return value


def _guard(text: str, markers: Mapping[str, int], guard: str) -> str:
    if not markers:
        return text
    text = _any_of(markers).sub(lambda found: found[0][:1] + guard + found[0][1:], text)
    inner = text.strip()
    begin = text.index(inner)
    before, after = text[:begin], text[begin + len(inner) :]
    heads = {marker[:size] for marker in markers for size in range(1, len(marker))}
    tails = {marker[size:] for marker in markers for size in range(1, len(marker))}
    if any(inner.endswith(head) for head in heads):
        inner += guard
    if any(inner.startswith(tail) for tail in tails):
        inner = guard + inner
    return f"{before}{inner}{after}"


def split_at(text: str, markers: Mapping[str, int]) -> Iterator[str]:
    """Markers and what is between them; nothing is empty."""
    pieces = re.split(f"({_any_of(markers).pattern})", text) if markers else [text]
    return (piece for piece in pieces if piece)


def _any_of(markers: Mapping[str, int]) -> re.Pattern[str]:
    """The leftmost marker and of those the longest, as the tokenizers library finds them."""
    return re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))))
