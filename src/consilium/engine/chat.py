"""Conversations: how a model reads them, what of them still fits, and how they are kept in a file."""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, final

from consilium.data.forms import Message, plain_turn
from consilium.data.template import NOTHING, Rendering, Template, TemplateCodec, find_template
from consilium.disk.atomic import write_file
from consilium.errors import ConsiliumError
from consilium.words.say import say

KIND: Final = "consilium-chat"
ROLES: Final = ("system", "user", "assistant")
_LARGEST: Final = 64 * 2**20


class ChatCodec(TemplateCodec, Protocol):
    """What a conversation needs of a tokenizer."""

    @property
    def opening_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...


class Format(Protocol):
    """From messages to the tokens that a model answers."""

    @property
    def name(self) -> str:
        """What the user is told of it."""
        ...

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, beside those that end every text of the model."""
        ...

    @property
    def source(self) -> str:
        """The template, '' without one."""
        ...

    def ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        switches: Mapping[str, bool] = NOTHING,
    ) -> list[int]:
        """``switches`` are told to a template that knows them."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Templated:
    """The model's own chat template."""

    template: Template
    tokenizer: ChatCodec
    stop_ids: tuple[int, ...]
    stops: tuple[str, ...] = ()
    rendering: Rendering = field(default_factory=Rendering)

    @property
    def name(self) -> str:
        return say("the model's own chat template ({where})", where=self.template.where)

    @property
    def source(self) -> str:
        return self.template.source

    def ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        switches: Mapping[str, bool] = NOTHING,
    ) -> list[int]:
        return self.template.ids(messages, self.tokenizer, self.rendering.render, tools, switches)


@final
@dataclass(frozen=True, slots=True)
class Questions:
    """Questions and answers as the built-in text writes them, for models that bring no template."""

    tokenizer: ChatCodec
    stops: tuple[str, ...] = ("\nQ:",)
    stop_ids: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return say('plain text, "Q: ..." and "A: ...", because the model brings no chat template')

    @property
    def source(self) -> str:
        return ""

    def ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        switches: Mapping[str, bool] = NOTHING,
    ) -> list[int]:
        del switches
        assert not tools, "they are told in text"
        text = "".join(map(plain_turn, messages))
        opening = self.tokenizer.opening_id
        return [*(() if opening is None else (opening,)), *self.tokenizer.encode(text)]


def chat_format(model: Path, tokenizer: ChatCodec) -> Format:
    """How the model of a folder or GGUF file reads a conversation.

    Raises ConsiliumError for a template that cannot be read or fails on a plain question and answer.
    """
    template = find_template(model, tokenizer)
    if template is None:
        return Questions(tokenizer)
    rendering = Rendering()
    ends = template.end_of_turn(tokenizer, rendering.render)
    return Templated(template, tokenizer, ends, rendering=rendering)


@final
@dataclass(frozen=True, slots=True)
class Conversation:
    """What was said, oldest first: perhaps a system message, then turns that each begin with the user."""

    messages: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        roles = [message.role for message in self.messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if (
            any(role not in ROLES for role in roles)
            or turns != (["user", "assistant"] * len(turns))[: len(turns)]
        ):
            raise ConsiliumError(
                "a conversation is perhaps a system message, then user and assistant in turn; this one has"
                f" {', '.join(roles[:6]) or 'nothing'}."
            )

    @property
    def system(self) -> str | None:
        return self.messages[0].content if self.messages[:1] and self.messages[0].role == "system" else None

    @property
    def turns(self) -> tuple[Message, ...]:
        return self.messages if self.system is None else self.messages[1:]

    def with_system(self, text: str) -> Conversation:
        """The same turns under another system message; '' is none."""
        return Conversation((*((Message("system", text),) if text else ()), *self.turns))

    def with_message(self, role: str, text: str) -> Conversation:
        return Conversation((*self.messages, Message(role, text)))

    def without_oldest(self, exchanges: int) -> Conversation:
        """Leave out so many questions with their answers; the system message stays."""
        kept = self.messages[: len(self.messages) - len(self.turns)]
        return Conversation((*kept, *self.turns[2 * exchanges :]))


def fitted(conversation: Conversation, form: Format, most: int) -> tuple[Conversation, list[int], int]:
    """Leave out as few of the oldest exchanges as make the rest at most ``most`` tokens.

    Returns what is left, its tokens, and how many exchanges went. The last question always stays, so that its
    tokens may be more.
    """
    exchanges = max(len(conversation.turns) - 1, 0) // 2

    def ids(left_out: int) -> list[int]:
        return form.ids(conversation.without_oldest(left_out).messages)

    whole = ids(0)
    if len(whole) <= most or not exchanges:
        return conversation, whole, 0
    fits = range(1, exchanges)
    gone = 1 + bisect.bisect_left(fits, True, key=lambda left_out: len(ids(left_out)) <= most)
    return conversation.without_oldest(gone), ids(gone), gone


def write_conversation(conversation: Conversation, path: Path) -> None:
    """Write a file that ``read_conversation`` reads, whole or not at all.

    Raises ConsiliumError where the file exists and is no conversation, or cannot be written.
    """
    if path.exists():
        try:
            read_conversation(path)
        except ConsiliumError:
            raise ConsiliumError(
                f"{path} exists and is no conversation of ours, so it is left alone; choose another name."
            ) from None
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    said = {"kind": KIND, "version": 1, "messages": messages}
    write_file(path, f"{json.dumps(said, indent=1)}\n".encode())


def read_conversation(path: Path) -> Conversation:
    """Read what ``write_conversation`` wrote. Raises ConsiliumError for every other file."""
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise ConsiliumError(
            f"cannot read {path} ({error.strerror}); give a file that /save wrote."
        ) from None
    try:
        return _conversation(json.loads(data if len(data) <= _LARGEST else b""))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ConsiliumError(f"{path} is no conversation; give a file that /save wrote.") from None


def _conversation(said: Any) -> Conversation:
    if said["kind"] != KIND or said["version"] != 1:
        raise ValueError
    messages = [Message(**message) for message in said["messages"]]
    if not all(isinstance(m.role, str) and isinstance(m.content, str) for m in messages):
        raise TypeError
    return Conversation(tuple(messages))
