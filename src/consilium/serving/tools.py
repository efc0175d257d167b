"""Calls of tools: how a model is told of them, and how its calls are read out of what it writes.

Models write calls in a few ways, which their chat templates show. A model whose template knows no tools is
told of them in its system message, in the commonest of these ways.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, Literal, final

from consilium.data.forms import Call, Message
from consilium.engine.request import Piece
from consilium.serving.answers import Answer, Spelling
from consilium.serving.body import Refused
from consilium.serving.protocol import ChatMessage, ChatRequest, Tool
from consilium.serving.thinking import BEGIN, END, Thought, split, without_beginning

Way = Literal["hermes", "mistral", "deepseek", "json"]

_BEGIN: Final[Mapping[Way, str]] = MappingProxyType(
    {
        "hermes": "<tool_call>",
        "mistral": "[TOOL_CALLS]",
        "deepseek": "<｜tool▁calls▁begin｜>",
        "json": "{",
    }
)
_END: Final = "</tool_call>"
_CALL, _SEPARATOR, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_NAMED: Final = re.compile(r"(?P<name>[\w.-]{1,64})(?:\[ARGS\])?\s*(?=\{)")
_DECODER: Final = json.JSONDecoder()
_MARKS: Final = frozenset(
    {*_BEGIN.values(), _END, BEGIN, END} | {_CALL, _SEPARATOR, _CALL_END, "<｜tool▁calls▁end｜>", "[ARGS]"}
)
"""Markers that are read as the text of their names, though they have none."""
_NOTHING: Final[Mapping[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}
"""What a function takes that names no parameters."""
_TOLD: Final = """# Tools

You may call one or more functions to answer the question. Their signatures are in <tools></tools>:
<tools>
{tools}
</tools>

For each call write a JSON object with the function's name and arguments in <tool_call></tool_call>:
<tool_call>
{{"name": <name>, "arguments": <arguments>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Read:
    """What an answer says so far: of a longer one both are longer, never other."""

    content: str
    calls: tuple[Call, ...] = ()
    reasoning: str = ""


def way_of(template: str) -> Way:
    """How a model writes calls, by its chat template."""
    for way in ("mistral", "deepseek"):
        if _BEGIN[way] in template:
            return way
    return "json" if "<tool_call>" not in template and '"parameters": ' in template else "hermes"


def read(text: str, way: Way, *, whole: bool) -> Read:
    """Take calls out of an answer. What may still become one is held back until the answer is ``whole``.

    What is cut in the middle of a call is no call, and no text either.
    """
    match way:
        case "hermes":
            return _hermes(text, whole=whole)
        case "mistral":
            before, mark, rest = text.partition(_BEGIN[way])
            if not mark:
                return Read(before if whole else without_beginning(before, _BEGIN[way]))
            return _or_text(before, rest, _listed(rest), whole=whole)
        case "deepseek":
            before, mark, rest = text.partition(_BEGIN[way])
            if not mark:
                return Read(before if whole else without_beginning(before, _BEGIN[way]))
            return _or_text(before, rest, _fenced(rest), whole=whole)
        case "json":
            if not text.lstrip().startswith("{") and (whole or text.strip()):
                return Read(text)
            call = _call(text) if whole else None
            return Read("", (call,)) if call is not None else Read(text if whole else "")


def _hermes(text: str, *, whole: bool) -> Read:
    content, calls, begin = "", list[Call](), _BEGIN["hermes"]
    while True:
        before, mark, rest = text.partition(begin)
        if not mark and not whole:
            before = without_beginning(before, begin)
        content += before.strip() if calls else before
        if not mark:
            return Read(content.rstrip() if calls else content, tuple(calls))
        body, end, text = rest.partition(_END)
        if not end:
            return Read(content.rstrip(), tuple(calls))
        call = _call(body)
        content = content.rstrip()
        if call is None:
            content += body
        else:
            calls.append(call)


def _call(text: str) -> Call | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    match found:
        case {"name": str() as name, "arguments": dict() as arguments}:
            return Call(name, arguments)
        case {"name": str() as name, "parameters": dict() as arguments}:
            return Call(name, arguments)
        case {"name": str() as name} if len(found) == 1:
            return Call(name, {})
        case _:
            return None


def _or_text(before: str, rest: str, calls: tuple[Call, ...], *, whole: bool) -> Read:
    """Text and calls behind it; what turns out to be none is text."""
    content = before.rstrip()
    return Read(content, calls) if calls or not whole else Read(content + _without_marks(rest))


def _without_marks(text: str) -> str:
    for mark in _MARKS:
        text = text.replace(mark, "")
    return text


def _fenced(text: str) -> tuple[Call, ...]:
    """Calls between their marks, as many as are whole: as DeepSeek-V3 and R1 write them, or as V3.1 does."""
    calls: list[Call | None] = []
    for part in text.split(_CALL)[1:]:
        body, end, _ = part.partition(_CALL_END)
        if not end:
            break
        name, _, told = body.partition(_SEPARATOR)
        if name == "function":
            name, _, told = told.partition("\n")
            told = told.strip().removeprefix("```json").removesuffix("```")
        calls.append(_arguments(name, told))
    return tuple(call for call in calls if call is not None)


def _arguments(name: str, text: str) -> Call | None:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return Call(name.strip(), arguments) if isinstance(arguments, dict) else None


def _listed(text: str) -> tuple[Call, ...]:
    """Lists of objects, objects, or names with arguments behind them, as far as they are whole."""
    calls: list[Call] = []
    while text := text.removeprefix(_BEGIN["mistral"]).lstrip():
        found = _NAMED.match(text)
        name, text = ("", text) if found is None else (found["name"], text[found.end() :])
        try:
            value, end = _DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            break
        if name:
            value = {"name": name, "arguments": value}
        made = [_call(json.dumps(one)) for one in (value if isinstance(value, list) else [value])]
        calls += [call for call in made if call is not None]
        text = text[end:].lstrip().removeprefix(",")
    return tuple(calls)


def schema_of(asked: ChatRequest) -> dict[str, Any] | None:
    """What a call has to be where one is required; None where the model may answer as it likes.

    Raises Refused for a tool that is not there.
    """
    tools, choice = asked.tools or [], asked.tool_choice
    if choice in (None, "none", "auto"):
        return None
    wanted = tools if choice == "required" else [t for t in tools if t.function.name == _chosen(choice)]
    if not wanted:
        raise Refused(400, "tool_choice asks for a tool that is not among tools", param="tool_choice")
    return {"anyOf": [_as_schema(tool) for tool in wanted]}


def _chosen(choice: object) -> str | None:
    return getattr(getattr(choice, "function", None), "name", None)


def _as_schema(tool: Tool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.function.name},
            "arguments": tool.function.parameters or _NOTHING,
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def conversation(messages: Sequence[ChatMessage]) -> list[Message]:
    """Messages as templates know them: what system and developer say is one message, in front.

    Raises Refused for a call in them that cannot have been one.
    """
    told = [message.text for message in messages if message.role in {"system", "developer"}]
    rest = [_message(m) for m in messages if m.role not in {"system", "developer"}]
    return [*([Message("system", "\n\n".join(told))] if told else ()), *rest]


def _message(message: ChatMessage) -> Message:
    calls = []
    for number, call in enumerate(message.tool_calls or ()):
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise Refused(
                400,
                f"tool_calls {number}: arguments are no JSON object: {call.function.arguments[:60]!r}",
                param="messages",
            )
        calls.append(Call(call.function.name, arguments, call.id))
    return Message(message.role, message.text, tuple(calls), message.tool_call_id)


def told_in_text(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The same conversation for a template that knows neither tools nor their answers."""
    signatures = "\n".join(json.dumps(tool.model_dump(exclude_none=True)) for tool in tools)
    system = [message.content for message in messages if message.role == "system"]
    texts = [*system, *([_TOLD.format(tools=signatures)] if tools else ())]
    rest = [_in_text(message) for message in messages if message.role != "system"]
    return [*([Message("system", "\n\n".join(texts))] if texts else ()), *rest]


def _in_text(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
    if not message.calls:
        return message
    calls = [
        f"<tool_call>\n{json.dumps({'name': call.name, 'arguments': call.arguments})}\n</tool_call>"
        for call in message.calls
    ]
    return Message(message.role, "\n".join([*filter(None, (message.content,)), *calls]))


@dataclass(frozen=True, slots=True)
class Reading:
    """How answers that may hold thoughts and calls are read; without a ``way`` what is no thought is text."""

    way: Way | None
    spelling: Spelling
    key: str
    """What the ids of calls begin with."""
    thinks: bool = False
    inside: bool = False
    """Whether the prompt began a thought."""
    required: bool = False
    """Whether an answer is a call, and text that is none is the beginning of one."""

    def text(self, piece: Piece) -> str:
        """What it says, and the name of a marker that is read, which has no text of its own."""
        if self.way is None and not self.thinks:
            return piece.text
        name = self.spelling.name(piece.token)
        return piece.text + name if name in _MARKS else piece.text

    def read(self, text: str, *, whole: bool) -> Read:
        thought = split(text, inside=self.inside, whole=whole) if self.thinks else Thought("", text)
        said = Read(thought.rest) if self.way is None else read(thought.rest, self.way, whole=whole)
        if self.required and not said.calls:
            said = Read("")
        return replace(said, reasoning=thought.reasoning)

    def as_told(self, call: Call, index: int, number: int) -> dict[str, Any]:
        """One call of answer ``index``, as the API has it."""
        return {
            "index": number,
            "id": f"call_{self.key}{index:02}{number:02}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
        }


@final
class Reader:
    """Reads one answer as it grows, each piece once."""

    def __init__(self, reading: Reading, index: int) -> None:
        self._reading, self._index = reading, index
        self._text, self._pieces = "", 0
        self._said = Read("")

    def added(self, answer: Answer) -> tuple[Read, list[dict[str, Any]]]:
        """Texts, and calls as the API has them, that pieces have added since the last time."""
        self._text += "".join(self._reading.text(piece) for piece in answer.pieces[self._pieces :])
        self._pieces = len(answer.pieces)
        before, now = self._said, self._reading.read(self._text, whole=answer.finish is not None)
        self._said = now
        calls = [
            self._reading.as_told(call, self._index, number)
            for number, call in enumerate(now.calls)
            if number >= len(before.calls)
        ]
        content, reasoning = now.content[len(before.content) :], now.reasoning[len(before.reasoning) :]
        return Read(content, reasoning=reasoning), calls

    def finish(self, answer: Answer) -> str | None:
        """Why it ended, of what was read."""
        return "tool_calls" if self._said.calls and answer.finish == "stop" else answer.finish
