"""A model's own chat template: from messages to token ids in which roles are tokens and text stays text.

A text that spells a marker (``<|im_end|>``) must not become it. Before rendering, a private character goes
into every such spelling; the rendered text is split at the markers that are left, which are the template's
own; then the character goes again, and what is between markers is encoded as text.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol, final

from consilium.data import render
from consilium.data.forms import Message
from consilium.data.guards import guarded, guarded_value, split_at, unused
from consilium.data.tokenizer import TEMPLATE_FILE as FILE
from consilium.errors import ConsiliumError
from consilium.machine.confined import Confined

MORE: Final = "additional_chat_templates"
DEFAULT: Final = "default"
_LARGEST: Final = 2**20
_TOKENS: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_PROBE: Final = "Probe"
NOTHING: Final[Mapping[str, bool]] = MappingProxyType({})
_ABSENT: Final = {"tools": None, "documents": None}
"""What transformers always gives a template: ``tools is not none`` holds for what is not defined."""
_BORDERS: Final = re.compile(r"</?think(?:ing)?>\s*")
_BACKWARDS: Final = re.compile(r"(?:\s|>(?:gni)?kniht/?<)*")
"""Blanks and borders of thoughts at the end of a text that is turned round: found in linear time."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Texts and ids of markers in order, all of them ``learned``, written by the model, or all only read."""

    parts: tuple[str | int, ...]
    learned: bool


class TemplateCodec(Protocol):
    """What a template needs of a tokenizer."""

    @property
    def markers(self) -> Mapping[str, int]:
        """Texts that stand for one token of their own and that no text may become, with their ids."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """What tokenizer_config.json says."""
        ...

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Encode texts and markers, given as ids, in order."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Template:
    """A Jinja template and where it was found."""

    source: str
    where: str

    def ids(
        self,
        messages: Sequence[Message],
        tokenizer: TemplateCodec,
        rendered_by: Render | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        switches: Mapping[str, bool] = NOTHING,
    ) -> list[int]:
        """Return the tokens of ``messages`` and of the opening of the answer.

        Raises ConsiliumError in one sentence where the template refuses them, fails, or does not end. Without
        ``rendered_by`` a process is started for it. ``tools`` are described as OpenAI's API does.
        """
        parts = self.parts(
            messages, tokenizer, opened=True, rendered_by=rendered_by, tools=tools, more=switches
        )
        return tokenizer.encode_parts(parts)

    @property
    def knows_tools(self) -> bool:
        return "tools" in self.source

    def segments(
        self, messages: Sequence[Message], tokenizer: TemplateCodec, rendered_by: Render, *, opening: str = ""
    ) -> list[Segment]:
        """Return what ``parts`` does, told apart: what the assistant wrote, with the marker that ends it.

        Characters that nobody has are put around each answer, and behind the borders of a thought in it: a
        template may cut the thought out, or put borders of its own around it. Up to an answer it is what the
        model is asked with: blanks and borders of thoughts before an answer are part of it, but for
        ``opening``, which ends the question.

        Raises ConsiliumError where the template writes something else for an answer with such characters.
        """
        markers = tokenizer.markers
        texts = [message.content for message in messages]
        guard, begin, end = itertools.islice(unused("".join((self.source, *texts, *markers))), 3)
        given = [guarded(message, markers, guard) for message in messages]
        marked = [
            one | {"content": _marked(one["content"], begin, end)} if one["role"] == "assistant" else one
            for one in given
        ]
        rendered, plain = (
            rendered_by(self, self._context(found, tokenizer, opened=False)) for found in (marked, given)
        )
        if rendered.replace(begin, "").replace(end, "") != plain:
            raise _mixes(self.where)
        told = _with_leads(rendered, begin, opening)
        pieces = [piece for part in split_at(told, markers) for piece in re.split(f"([{begin}{end}])", part)]
        found = _learned(
            [text for piece in pieces if (text := piece.replace(guard, ""))], markers, begin, end
        )
        return [
            Segment(tuple(part for part, _ in run), learned=learned)
            for learned, run in itertools.groupby(found, key=lambda pair: pair[1])
        ]

    def opening(self, tokenizer: TemplateCodec, rendered_by: Render) -> str:
        """Return blanks and borders of thoughts at the end of a question that waits for its answer."""
        asked = [{"role": "user", "content": "Hello"}]
        return _lead(rendered_by(self, self._context(asked, tokenizer, opened=True)))

    def _context(
        self, messages: Sequence[Mapping[str, str]], tokenizer: TemplateCodec, *, opened: bool
    ) -> dict[str, Any]:
        return {
            "messages": messages,
            "add_generation_prompt": opened,
            **_ABSENT,
            **_special_texts(tokenizer.config),
        }

    def parts(
        self,
        messages: Sequence[Message],
        tokenizer: TemplateCodec,
        *,
        opened: bool,
        rendered_by: Render | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        more: Mapping[str, bool] = NOTHING,
    ) -> list[str | int]:
        """Return texts and ids of markers in order; ``opened``: with the opening of an answer at the end."""
        markers = tokenizer.markers
        texts = [message.content for message in messages]
        told = [
            json.dumps([call.arguments for message in messages for call in message.calls]),
            *map(str, tools),
        ]
        guard = next(unused("".join((self.source, *texts, *told, *markers))))
        given = [guarded(message, markers, guard) for message in messages]
        context = self._context(given, tokenizer, opened=opened) | dict(more)
        if tools:
            context["tools"] = guarded_value(tools, markers, guard)
        rendered = (rendered_by or _render)(self, context)
        return [
            markers[part] if part in markers else part.replace(guard, "")
            for part in split_at(rendered, markers)
        ]

    def end_of_turn(self, tokenizer: TemplateCodec, rendered_by: Render | None = None) -> tuple[int, ...]:
        """Return the marker that the template puts behind an answer, if it puts one."""
        asked = (Message("user", "Hello"), Message("assistant", _PROBE))
        parts = self.parts(asked, tokenizer, opened=False, rendered_by=rendered_by)
        answer = next((i for i, part in enumerate(parts) if isinstance(part, str) and _PROBE in part), None)
        if answer is None or str(parts[answer]).partition(_PROBE)[2].strip():
            return ()
        behind = parts[answer + 1 : answer + 2]
        return tuple(part for part in behind if isinstance(part, int))


Render = Callable[[Template, Mapping[str, Any]], str]


@final
class Rendering:
    """Renders many conversations in one confined process, which starts with the first of them.

    Threads take turns.
    """

    def __init__(self) -> None:
        self._process: Confined | None = None
        self._turn = threading.Lock()

    def render(self, template: Template, context: Mapping[str, Any]) -> str:
        """Raises ConsiliumError in one sentence where the template fails or does not end."""
        with self._turn:
            return self._render(template, context)

    def _render(self, template: Template, context: Mapping[str, Any]) -> str:
        if self._process is None:
            self._process = Confined(render.__name__, memory=render.MEMORY)
        request = {"template": template.source, "context": context}
        try:
            return self._process.ask(request, seconds=render.SECONDS)
        except TimeoutError:
            why = f"it was stopped after {render.SECONDS:.0f} seconds of work"
        except RuntimeError as error:
            why = " ".join(str(error).split())
        self.close()
        raise ConsiliumError(
            f"{template.where} fails ({why}); mend it, or write another one into {FILE} beside the weights."
        )

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None


def find_template(model: Path, tokenizer: TemplateCodec) -> Template | None:
    """Return the default template of a folder or GGUF file, None where it has none.

    As in transformers, ``chat_template.jinja`` comes before tokenizer_config.json, which holds one template
    or a list of named ones. Raises ConsiliumError for what is no template and where none is the default.
    """
    named = _in_config(tokenizer.config.get("chat_template"), model) | _in_files(model)
    if not named:
        return None
    if DEFAULT not in named:
        raise ConsiliumError(
            f"{model} has chat templates named {', '.join(sorted(named))} and none named {DEFAULT}; write the"
            f" one to use into {FILE}."
        )
    return named[DEFAULT]


def _in_config(value: object, model: Path) -> dict[str, Template]:
    where = f"{model}: its chat_template"
    match value:
        case None:
            return {}
        case str():
            return {DEFAULT: Template(value, where)}
        case [*several] if all(isinstance(one, dict) for one in several):
            named = {str(one.get("name")): one.get("template") for one in several}
            if all(isinstance(one, str) for one in named.values()):
                return {name: Template(str(one), f"{where} {name}") for name, one in named.items()}
        case _:
            pass
    raise ConsiliumError(f"{where} is neither a text nor a list of named ones; remove or mend the key.")


def _in_files(model: Path) -> dict[str, Template]:
    if not model.is_dir():
        return {}
    paths = {path.stem: path for path in sorted((model / MORE).glob("*.jinja"))}
    if (model / FILE).exists():
        paths[DEFAULT] = model / FILE
    return {name: Template(_read(path), str(path)) for name, path in paths.items()}


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ConsiliumError(f"{path} is larger than {_LARGEST:,} bytes, so no chat template; remove it.")
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConsiliumError(
            f"cannot read the chat template {path} ({error}); copy it again from its source."
        ) from None


def _special_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and its like by name: a text, alone or among its flags."""
    values = {f"{name}_token": config.get(f"{name}_token") for name in _TOKENS}
    texts = {name: one.get("content") if isinstance(one, dict) else one for name, one in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _mixes(where: str) -> ConsiliumError:
    return ConsiliumError(
        f"{where} writes answers otherwise than they are given, so what of it is learned cannot be told;"
        f" write into {FILE} a template that takes them whole."
    )


def _marked(content: str, begin: str, end: str) -> str:
    """``content`` between two characters, inside its blanks: a template may strip those.

    A thought at its beginning keeps that place, which templates look at.
    """
    inner = content.strip()
    start = content.index(inner)
    told = _BORDERS.sub(lambda found: found[0] + begin, inner)
    first = "" if _BORDERS.match(inner) else begin
    return f"{content[:start]}{first}{told}{end}{content[start + len(inner) :]}"


def _lead(text: str) -> str:
    """Blanks and borders of thoughts at the end of ``text``."""
    found = _BACKWARDS.match(text[::-1])
    assert found is not None, "nothing is a match too"
    return text[len(text) - found.end() :]


def _with_leads(rendered: str, begin: str, opening: str) -> str:
    """Move what leads to an answer into the answer, but for ``opening``."""
    *before, rest = rendered.split(begin)
    told: list[str] = []
    for text in before:
        lead = _lead(text)
        own = lead.removeprefix(opening)
        told.append(f"{text.removesuffix(own)}{begin}{own}")
    return "".join([*told, rest])


def _learned(
    pieces: Sequence[str], markers: Mapping[str, int], begin: str, end: str
) -> Iterator[tuple[str | int, bool]]:
    """Parts and whether the assistant wrote them; a marker right behind an answer, or a blank, is its."""
    inside = False
    for i, piece in enumerate(pieces):
        if piece in (begin, end):
            inside = piece == begin
            continue
        yield markers.get(piece, piece), inside or _ends_turn(pieces, i, markers, end)


def _ends_turn(pieces: Sequence[str], place: int, markers: Mapping[str, int], end: str) -> bool:
    """Whether a piece is the marker behind an answer, or the blank before that."""
    piece = pieces[place]
    before = pieces[place - 1] if place else ""
    if piece in markers:
        blank = before not in markers and not before.strip() and place > 1
        return before == end or (blank and pieces[place - 2] == end)
    behind = pieces[place + 1] if place + 1 < len(pieces) else ""
    return not piece.strip() and before == end and behind in markers


def _render(template: Template, context: Mapping[str, Any]) -> str:
    with contextlib.closing(Rendering()) as once:
        return once.render(template, context)
