"""What a text is made of: plain text, a prompt with its completion, or a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from consilium.errors import ConsiliumError, nearest

_PLAIN: Final = {"system": "{}\n\n", "user": "Q: {}\nA:", "assistant": " {}\n"}


@dataclass(frozen=True, slots=True)
class Call:
    """A tool that an assistant asked for."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str
    calls: tuple[Call, ...] = ()
    """Of an assistant."""
    answers: str | None = None
    """The id of the call whose result this is."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The prompt is read, the completion is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Talk:
    """What the assistant says is learned."""

    messages: tuple[Message, ...]


Content = str | Completion | Talk


def plain_turn(message: Message) -> str:
    """A message as the built-in text writes it, for models that bring no template.

    Raises ConsiliumError for a role that this form has not.
    """
    if message.role not in _PLAIN:
        raise ConsiliumError(
            f"without a chat template there is no role {message.role[:40]!r}; give the tokenizer a template,"
            f" or use {', '.join(_PLAIN)}."
        )
    answers = message.role == "assistant"
    return _PLAIN[message.role].format(message.content.strip() if answers else message.content)


def plain(content: Content) -> str:
    """All text of ``content``, for what counts letters and knows no tokenizer."""
    match content:
        case str():
            return content
        case Completion(prompt=prompt, completion=completion):
            return prompt + completion
        case Talk(messages=messages):
            return "".join(plain_turn(message) for message in messages)


def canonical(content: Content) -> bytes:
    """Bytes that are the same for the same content alone."""
    match content:
        case str():
            return content.encode()
        case Completion(prompt=prompt, completion=completion):
            return json.dumps(["completion", prompt, completion]).encode()
        case Talk(messages=messages):
            return json.dumps(["talk", *([m.role, m.content] for m in messages)]).encode()


def read_record(record: Mapping[str, object], where: str) -> Content:
    """Return the content of a record: ``text``, ``messages``, or ``prompt`` and ``completion``.

    A key that is null is absent: tables with several forms write all their columns. Raises
    ConsiliumError that begins with ``where`` for a record of none of these forms, or of several.
    """
    found = [key for key in ("text", "messages", "prompt", "completion") if record.get(key) is not None]
    match found:
        case ["text"]:
            return _string(record["text"], "text", where)
        case ["messages"]:
            return _talk(record["messages"], where)
        case ["prompt", "completion"]:
            given = (_string(record[key], key, where) for key in found)
            return Completion(*given)
        case [] | ["prompt"] | ["completion"]:
            missing = "text" if not found else "completion" if found == ["prompt"] else "prompt"
            if missing in record:
                raise ConsiliumError(f"{where}: key {missing!r} is null; write text in it.")
            raise ConsiliumError(f"{where} has no key {missing!r}.{nearest(missing, map(str, record))}")
        case _:
            raise ConsiliumError(
                f"{where} has {' and '.join(map(repr, found))}; a record is a text, messages, or a prompt and"
                " a completion, so keep one of them."
            )


def read_domain(record: Mapping[str, object], default: str, where: str) -> str:
    return _string(record["domain"], "domain", where) if record.get("domain") is not None else default


def _string(text: object, key: str, where: str) -> str:
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise ConsiliumError(f"{where}: key {key!r} is {kind}, not a string; write text in it.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConsiliumError(f"{where}: key {key!r} has half of a surrogate pair; remove it.") from None
    return text


def _talk(messages: object, where: str) -> Talk:
    if not isinstance(messages, list) or not messages:
        raise ConsiliumError(
            f'{where}: key \'messages\' is no list of messages; write [{{"role": ..., "content": ...}}].'
        )
    found = tuple(_message(one, f"{where}, message {i}") for i, one in enumerate(messages, start=1))
    if not any(message.role == "assistant" for message in found):
        raise ConsiliumError(
            f"{where} has no message of the assistant, so there is nothing to learn; leave it out."
        )
    return Talk(found)


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise ConsiliumError(f"{where} is {type(message).__name__}, not an object with role and content.")
    for key in ("role", "content"):
        if key not in message:
            raise ConsiliumError(f"{where} has no key {key!r}.{nearest(key, map(str, message))}")
    for key, value in message.items():
        if key not in {"role", "content"} and value is not None:
            raise ConsiliumError(f"{where} has the key {key!r}, which is not read; take it out.")
    return Message(_string(message["role"], "role", where), _string(message["content"], "content", where))
