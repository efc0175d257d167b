"""Calls of tools: read out of every way of writing them, kept by a schema, told to every template."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from random import Random
from typing import Any, Literal, cast

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from consilium.data.forms import Call, Message
from consilium.data.template import Template
from consilium.data.tokenizer import Tokenizer
from consilium.engine.chat import Templated
from consilium.engine.request import Piece
from consilium.serving.answers import Answer, Spelling
from consilium.serving.tools import Reader, Reading, Way, read, told_in_text, way_of
from serving.served import NAME, Server, engine_of, serving

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
MARKS = ("<tool_call>", "[TOOL_CALLS]", "<｜tool▁calls▁begin｜>")
ADD = {"type": "function", "function": {"name": "add"}}

texts = st.text('ab <>[]{}\n"tol_cTOLCAS/', max_size=12)
calls = st.lists(
    st.builds(
        Call, st.sampled_from(["f", "g"]), st.dictionaries(st.sampled_from("xy"), st.integers() | texts)
    ),
    min_size=1,
    max_size=3,
)


def deepseek(call: Call, *, old: bool) -> str:
    arguments = json.dumps(dict(call.arguments))
    name, told = ("function", f"{call.name}\n```json\n{arguments}\n```") if old else (call.name, arguments)
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{told}<｜tool▁call▁end｜>"


def written(before: str, some: list[Call], way: Literal[Way, "old deepseek"]) -> str:
    objects = [json.dumps({"name": call.name, "arguments": dict(call.arguments)}) for call in some]
    match way:
        case "hermes":
            return before + "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
        case "mistral":
            return f"{before}[TOOL_CALLS][{', '.join(objects)}]"
        case "deepseek" | "old deepseek":
            told = "\n".join(deepseek(call, old=way != "deepseek") for call in some)
            return f"{before}<｜tool▁calls▁begin｜>{told}<｜tool▁calls▁end｜>"
        case "json":
            return objects[0]


@pytest.mark.parametrize("way", ["hermes", "mistral", "deepseek", "old deepseek", "json"])
@given(before=texts, some=calls)
def test_calls_are_read_at_every_cut_and_no_markup_is_text(
    way: Literal[Way, "old deepseek"], before: str, some: list[Call]
) -> None:
    before = re.sub("|".join(map(re.escape, MARKS)), "", before)
    text = written(before, some, way)
    way = "deepseek" if way == "old deepseek" else way
    # A beginning in the text may make another mark with what follows.
    assume(way == "json" or sum(map(text.count, MARKS)) in {1, len(some)})
    right = read(text, way, whole=True)
    if way != "json":
        assert right.content == before.rstrip()
    assert right.calls == tuple(some[:1] if way == "json" else some)
    last = read("", way, whole=False)
    for size in range(len(text) + 1):
        found = read(text[:size], way, whole=size == len(text))
        assert found.content.startswith(last.content), "what is sent is never taken back"
        assert found.calls[: len(last.calls)] == last.calls
        cut = read(text[:size], way, whole=True)
        assert not any(mark in cut.content for mark in MARKS)
        last = found


class Counting:
    """A spelling that counts who asks it."""

    asked = 0

    def name(self, _: int) -> str:
        self.asked += 1
        return "A"


@given(before=texts, some=calls, seed=st.integers(0, 99))
def test_pieces_add_up_to_the_answer_and_each_is_read_once(before: str, some: list[Call], seed: int) -> None:
    text, random = written(before, some, "hermes"), Random(seed)
    right = read(text, "hermes", whole=True)
    spelling = Counting()
    reader = Reader(Reading("hermes", cast(Spelling, spelling), "key"), 0)
    answer, content, told = Answer(()), "", list[Any]()
    while text or answer.finish is None:
        size = random.randint(0, 9)
        piece, text = text[:size], text[size:]
        answer.pieces.append(Piece(0, 65, piece, 0.0, None if text else "stop"))
        if random.random() < 0.7 or not text:
            said, more = reader.added(answer)
            content, told = content + said.content, told + more
    assert content == right.content
    assert spelling.asked == len(answer.pieces)
    assert [json.loads(call["function"]["arguments"]) for call in told] == [
        dict(c.arguments) for c in right.calls
    ]
    assert [call["index"] for call in told] == list(range(len(right.calls)))
    assert reader.finish(answer) == ("tool_calls" if right.calls else "stop")


@pytest.mark.parametrize("way", ["hermes", "mistral", "deepseek", "json"])
@given(text=texts)
def test_an_answer_without_calls_is_its_text(way: Way, text: str) -> None:
    assume(not any(mark in text for mark in MARKS))
    assert read(text, way, whole=True).content == text


def test_what_is_no_call_is_text_without_its_marks() -> None:
    assert read("a<tool_call>no json</tool_call>b", "hermes", whole=True).content == "ano jsonb"
    assert read('{"x": 1}', "json", whole=True).content == '{"x": 1}'
    assert read("[TOOL_CALLS]no", "mistral", whole=True).calls == ()


def test_the_way_is_that_of_the_template() -> None:
    assert way_of("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert way_of("[AVAILABLE_TOOLS] [TOOL_CALLS]") == "mistral"
    assert way_of('Respond with {"name": x, "parameters": y} for tools') == "json"
    assert way_of("{{ '<｜tool▁calls▁begin｜>' }}") == "deepseek"
    assert way_of("") == "hermes"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(engine_of(length=2048)) as found:
        yield found


def create(server: Server, **more: Any) -> Any:
    asked: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Weather?"}],
        "max_tokens": 300,
    }
    return server.client().chat.completions.create(**(asked | {"tools": [WEATHER, ADD]} | more))


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_asked_for_keeps_its_schema(choice: Any, stream: bool, server: Server) -> None:
    for seed in range(4):
        found = create(server, tool_choice=choice, stream=stream, seed=seed, temperature=1.2)
        if stream:
            chunks = [chunk.choices[0] for chunk in found]
            reason = chunks[-1].finish_reason
            (call,) = [one for chunk in chunks for one in chunk.delta.tool_calls or ()]
            assert not "".join(chunk.delta.content or "" for chunk in chunks)
        else:
            reason, message = found.choices[0].finish_reason, found.choices[0].message
            (call,) = message.tool_calls
            assert message.content is None
        assert reason == "tool_calls"
        arguments = json.loads(call.function.arguments)
        if choice != "required":
            assert call.function.name == "weather"
        if call.function.name == "weather":
            assert set(arguments) == {"city", "days"}
            assert arguments["days"] in {1, 2, 3}


FORCED = """Sure. <tool_call>
{"name": "add", "arguments": {"x": [1, "a"]}}
</tool_call>
<tool_call>
{"name": "add", "arguments": {}}
</tool_call>"""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("most", [5, 40, 90, 300])
def test_calls_among_text_are_told_apart_at_every_end(most: int, stream: bool, server: Server) -> None:
    extra = {"structured_outputs": {"choice": [FORCED]}}
    found = create(server, max_tokens=most, stream=stream, extra_body=extra)
    if stream:
        chunks = [chunk.choices[0] for chunk in found]
        content = "".join(chunk.delta.content or "" for chunk in chunks)
        called = [one for chunk in chunks for one in chunk.delta.tool_calls or ()]
        reason = chunks[-1].finish_reason
    else:
        content, called = found.choices[0].message.content or "", found.choices[0].message.tool_calls or []
        reason = found.choices[0].finish_reason
    assert "Sure.".startswith(content)
    assert [json.loads(one.function.arguments) for one in called] == [{"x": [1, "a"]}, {}][: len(called)]
    if stream:
        assert [one.index for one in called] == list(range(len(called)))
    assert (reason, len(called)) == ("tool_calls", 2) if most == 300 else reason == "length"


def test_a_conversation_with_calls_goes_on(server: Server) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    ]
    found = create(server, messages=messages, max_tokens=4)
    assert found.choices[0].finish_reason in {"length", "stop"}
    text = server.service.tokenizer.decode(server.service.form.ids(told_in_text([Message("user", "x")], ())))
    assert "Q: x" in text


@pytest.mark.parametrize("arguments", ["{", "[]", "1", "nan", '"x"', "{'a': 1}"])
def test_broken_arguments_in_a_conversation_are_refused_and_the_next_turn_works(
    arguments: str, server: Server
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    body = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}],
        "max_tokens": 2,
    }
    with server.http() as client:
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert "no JSON object" in answer.json()["error"]["message"]
        call["function"]["arguments"] = "{}"
        assert client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"tool_choice": {"type": "function", "function": {"name": "nobody"}}},
        {"tool_choice": "always"},
        {"tools": [{"type": "function", "function": {"name": "with blank"}}]},
        {"tools": [{"type": "retrieval"}]},
        {"tools": [ADD] * 129},
        {"tool_choice": "required", "response_format": {"type": "json_object"}},
        {
            "tool_choice": "required",
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "no"}}}],
        },
    ],
    ids=lambda wrong: str(wrong)[:50],
)
def test_what_is_no_tool_is_refused(wrong: dict[str, Any], server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [ADD], "max_tokens": 2} | wrong
    answer = server.http().post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text


def test_templates_that_know_tools_are_given_them_and_texts_stay_texts() -> None:
    """Markers in names, arguments and results are text there, as in all else that comes from outside."""
    tokenizer = Tokenizer.of_bytes()
    source = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}{{ m.tool_call_id }}"
        "{% endfor %}"
    )
    form = Templated(Template(source, "here"), tokenizer, ())
    marker = next(iter(tokenizer.markers))
    messages = [
        Message("assistant", "", (Call("f", {"x": [marker, {"y": marker}]}, "1"),)),
        Message("tool", f"a{marker}b", answers="1"),
    ]
    ids = form.ids(messages, [{"type": "function", "function": {"name": "f", "description": marker}}])
    assert not set(ids) & set(tokenizer.markers.values())
    text = tokenizer.decode(ids)
    assert text.count(marker) == 4
    assert '"description"' in text
    form.rendering.close()


def test_ten_turns_compute_what_is_new() -> None:
    """Beginnings are kept by whole parts: each turn computes its own tokens and at most a part more."""
    random = Random(0)
    with serving(engine_of(most_tokens=32768, length=8192)) as server:
        messages: list[dict[str, Any]] = [{"role": "system", "content": "s" * 700}]
        last = 0
        for turn in range(10):
            messages.append({"role": "user", "content": "".join(random.choices("abc ", k=200))})
            found = server.client().chat.completions.create(
                model=NAME, messages=messages, max_tokens=20, temperature=0
            )
            usage = found.usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            cached = usage.prompt_tokens_details.cached_tokens or 0
            if turn:
                assert usage.prompt_tokens - cached <= usage.prompt_tokens - last + 512
            last = usage.prompt_tokens
            messages.append({"role": "assistant", "content": found.choices[0].message.content})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('[TOOL_CALLS][{"name": "f", "arguments": {}}] done', ["f"]),
        ('[TOOL_CALLS]f{"a": 1}', ["f"]),
        ('[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}', ["f", "g"]),
        ('[TOOL_CALLS][{"name": "f"}][{"name": "g"}]', ["f", "g"]),
        ('[TOOL_CALLS]{"name": "f"} {"name": "g"}', ["f", "g"]),
    ],
)
def test_mistral_writes_calls_in_several_ways(text: str, names: list[str]) -> None:
    found = read(text, "mistral", whole=True)
    assert [call.name for call in found.calls] == names
    assert found.content == ""


@pytest.mark.parametrize("way", ["mistral", "deepseek"])
def test_what_no_call_comes_of_is_text(way: Way) -> None:
    begin = {"mistral": "[TOOL_CALLS]", "deepseek": "<｜tool▁calls▁begin｜>"}[way]
    assert read(f"Well {begin}no call", way, whole=True).content == "Wellno call"
    assert read(f"Well {begin}no call", way, whole=False).content == "Well"


def test_a_marker_over_and_over_takes_no_more_than_its_length() -> None:
    times = []
    for count in (2_000, 16_000):
        text = "<｜tool▁calls▁begin｜>" + "<｜tool▁call▁begin｜>" * count
        began = time.perf_counter()
        read(text, "deepseek", whole=False)
        times.append(time.perf_counter() - began)
    assert times[1] < 40 * times[0] + 0.05


def test_a_required_call_that_is_cut_is_no_text(server: Server) -> None:
    found = create(server, tool_choice="required", max_tokens=4).choices[0]
    assert found.finish_reason == "length"
    assert not found.message.content
    assert not found.message.tool_calls
