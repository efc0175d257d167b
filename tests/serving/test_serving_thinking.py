"""Thoughts are told apart from answers, whole or streamed, and an answer's form does not bind them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from consilium.engine import rows
from consilium.serving.answers import Spelling
from consilium.serving.thinking import BEGIN, END, AfterThought, opened, split, thinks
from serving.served import NAME, Server, engine_of, serving

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
MAY = PLAIN + "{# <think> </think> #}"
MUST = (
    PLAIN
    + "{% if enable_thinking is not defined or enable_thinking %}<think>\n"
    + "{% else %}<think></think>{% endif %}"
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
words = st.text("ab <>/think\n", max_size=12)


@given(thought=words, rest=words, inside=st.booleans())
def test_both_are_told_apart_at_every_cut(thought: str, rest: str, inside: bool) -> None:
    assume(END not in thought)
    assume(END not in f"{thought}{END}"[:-1])
    text = f"{'' if inside else BEGIN}{thought}{END}{rest}"
    right = split(text, inside=inside, whole=True)
    assert (right.reasoning, right.rest) == (thought.strip(), rest.lstrip())
    last = split("", inside=inside, whole=False)
    for size in range(len(text) + 1):
        found = split(text[:size], inside=inside, whole=size == len(text))
        assert found.reasoning.startswith(last.reasoning), "what is sent is never taken back"
        assert found.rest.startswith(last.rest)
        last = found
    assert last == right


@given(text=words)
def test_an_answer_without_a_thought_is_its_text(text: str) -> None:
    assume(not text.lstrip().startswith(BEGIN))
    last = ""
    for size in range(len(text) + 1):
        found = split(text[:size], inside=False, whole=size == len(text))
        assert found.reasoning == ""
        assert found.rest.startswith(last)
        last = found.rest
    assert last == text


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(engine_of(), template=MUST) as found:
        yield found


def create(server: Server, **more: Any) -> Any:
    asked: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Weather?"}],
        "max_tokens": 300,
    }
    return server.client().chat.completions.create(**(asked | more))


def script(monkeypatch: pytest.MonkeyPatch, server: Server, text: str) -> None:
    """Let answers begin with ``text``, which has to be allowed, and go on as the model would."""
    tokens, drawn = server.service.tokenizer.encode(text), rows.sample

    def scripted(
        logits_V: Tensor, sampling: Any, generator: Any, seen: Any, prompt: int
    ) -> tuple[int, float]:
        place = len(seen) - prompt
        if place >= len(tokens):
            return drawn(logits_V, sampling, generator, seen, prompt)
        assert logits_V[tokens[place]] > -torch.inf
        return tokens[place], -1.0

    monkeypatch.setattr(rows, "sample", scripted)


FORM = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_binds_the_answer_and_not_the_thought(
    stream: bool, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred of a hundred."""
    for seed in range(50):
        thought = f"{{'no': JSON}} <thin {seed} </thin > {seed}"
        script(monkeypatch, server, f"{thought}</think>")
        found = create(server, response_format=FORM, seed=seed, temperature=1.0, stream=stream)
        if stream:
            deltas = [chunk.choices[0].delta for chunk in found]
            reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
            content = "".join(delta.content or "" for delta in deltas)
        else:
            reasoning, content = found.choices[0].message.reasoning_content, found.choices[0].message.content
        monkeypatch.undo()
        assert reasoning == thought
        assert set(json.loads(content)) == {"city", "days"}


def test_a_thought_that_is_cut_is_no_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, server, "so far and on and on</thi")
    found = create(server, max_tokens=12, response_format=FORM).choices[0]
    assert found.message.reasoning_content == "so far and o"
    assert found.message.content == ""
    assert found.finish_reason == "length"


def test_a_model_is_asked_not_to_think(server: Server) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    found = create(server, response_format=FORM, extra_body=extra).choices[0].message
    assert set(json.loads(found.content)) == {"city", "days"}
    assert not hasattr(found, "reasoning_content")


def test_calls_behind_a_thought_are_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    call = '{"name": "add", "arguments": {"x": 1}}'
    script(monkeypatch, server, f"I add.</think>Well. <tool_call>{call}</tool_call>")
    tools = [{"type": "function", "function": {"name": "add"}}]
    found = create(server, tools=tools, max_tokens=90, stop=["</tool_call>"]).choices[0]
    assert found.message.reasoning_content == "I add."
    assert found.message.content == "Well."


@pytest.mark.parametrize(
    "switches",
    [{"enable_thinking": "no"}, {"add_generation_prompt": False}, {"messages": []}, "off"],
    ids=str,
)
def test_templates_are_told_nothing_else(switches: Any, server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": switches}
    answer = server.http().post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "chat_template_kwargs" in answer.json()["error"]["message"]


@dataclass(frozen=True)
class Words:
    """A tokenizer of a few words."""

    texts: tuple[str, ...]

    @property
    def markers(self) -> dict[str, int]:
        return {text: token for token, text in enumerate(self.texts) if text in {BEGIN, END}}

    @property
    def known_ids(self) -> range:
        return range(len(self.texts))

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        return b"".join(b"" if self.texts[t] in {BEGIN, END} else self.texts[t].encode() for t in tokens)


TEXTS = ("a", "b", "<", "</", "think", ">", "> b", "</think>b", "</think>\n", BEGIN, END, "1")
SPELLING = Spelling(Words(TEXTS))


class Ones:
    """A form of ``1`` twice."""

    def __init__(self) -> None:
        self.left = 2

    def begin(self) -> Ones:
        return Ones()

    def allowed(self) -> Tensor:
        return torch.tensor([text == "1" and self.left > 0 for text in TEXTS])

    def accept(self, token: int) -> None:
        assert TEXTS[token] == "1"
        self.left -= 1

    @property
    def may_end(self) -> bool:
        return self.left == 0

    is_over = may_end


@pytest.mark.parametrize("inside", [False, True])
def test_whatever_a_model_draws_its_answer_has_the_form(inside: bool) -> None:
    """Tokens that end a thought may not say more, however the mark is cut into tokens."""
    ended = thought_of = 0
    for seed in range(400):
        random, form = Random(seed), AfterThought(Ones(), inside, SPELLING, len(TEXTS)).begin()
        text = ""
        for _ in range(60):
            allowed = [token for token, may in enumerate(form.allowed().tolist()) if may]
            if not allowed:
                break
            token = random.choice(allowed)
            form.accept(token)
            text += TEXTS[token]
            if form.may_end:
                break
        found = split(text, inside=inside, whole=True)
        ended += form.may_end
        thought_of += bool(found.reasoning)
        assert found.rest == "11" if form.may_end else "11".startswith(found.rest)
        assert form.is_over == form.may_end
    assert ended > 300
    assert thought_of > 100


def test_a_prompt_that_ends_in_a_thought_is_seen() -> None:
    tokens = {text: token for token, text in enumerate(TEXTS)}
    assert opened([tokens["a"], tokens[BEGIN]], SPELLING)
    assert opened([tokens["<"], tokens["think"], tokens[">"]], SPELLING)
    assert not opened([tokens[BEGIN], tokens[END]], SPELLING)
    assert not opened([], SPELLING)
    assert thinks(MUST)
    assert not thinks(PLAIN)
