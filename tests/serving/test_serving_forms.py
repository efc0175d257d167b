"""Answers of a form: whatever the model would rather say is valid; what is no form is refused."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from random import Random
from typing import Any

import httpx2 as httpx
import pytest

from consilium.serving import grammar
from serving.served import Server, engine_of, serving

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CHAT = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 200, "temperature": 1.5}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(engine_of(length=512)) as found:
        yield found


def said(server: Server, **more: Any) -> str:
    answer = server.http().post("/v1/chat/completions", json=CHAT | more)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "stop", "a form that is complete ends the answer"
    return str(choice["message"]["content"])


def test_an_untrained_model_keeps_a_schema(server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    for seed in range(4):
        found = json.loads(said(server, response_format=form, seed=seed))
        assert set(found) == {"name", "age", "tags"}
        assert 0 <= found["age"] <= 150
        assert set(found["tags"]) <= {"a", "b"}


def test_choices_and_expressions_are_kept(server: Server) -> None:
    for seed in range(5):
        assert said(server, structured_outputs={"choice": ["yes", 'no "way"', "ja\n"]}, seed=seed) in {
            "yes",
            'no "way"',
            "ja\n",
        }
        found = said(server, structured_outputs={"regex": "[0-9]{3}-[a-f]{2}"}, seed=seed)
        assert re.fullmatch("[0-9]{3}-[a-f]{2}", found)
        found = said(server, structured_outputs={"json": {"enum": [1, "x", None]}}, seed=seed)
        assert json.loads(found) in [1, "x", None]


def test_a_stream_keeps_it_too_and_neighbours_are_free(server: Server) -> None:
    client = server.client()
    free = client.completions.create(model="small", prompt="a", max_tokens=20, temperature=0).choices[0].text
    chunks = client.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": "x"}],
        stream=True,
        n=2,
        extra_body={"structured_outputs": {"choice": ["left", "right"]}},
    )
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert (
            client.completions.create(model="small", prompt="a", max_tokens=20, temperature=0).choices[0].text
            == free
        )
    assert set(texts.values()) <= {"left", "right"}


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no such"}}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"$ref": "http://example.org/x"}},
            }
        },
        {"response_format": {"type": "yaml"}},
        {"structured_outputs": {"regex": "(["}},
        {"structured_outputs": {"regex": "(?<=a)b\\1"}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"choice": [""]}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"structured_outputs": {"regex": "a" * 70_000}},
        {"structured_outputs": {"json": {"type": "integer", "minimum": 5, "maximum": 3}}},
    ],
    ids=lambda form: json.dumps(form)[:60],
)
def test_what_is_no_form_is_refused(form: dict[str, Any], server: Server) -> None:
    answer = server.http().post("/v1/chat/completions", json=CHAT | form)
    assert answer.status_code == 400, answer.text
    assert len(answer.json()["error"]["message"]) < 400


def schema(random: Random, depth: int = 0) -> Any:
    kinds: list[Any] = [
        {},
        {"type": "string"},
        {"type": "null"},
        {"type": ["string", 5]},
        {"enum": []},
        {"const": 1},
        True,
        False,
        None,
        {"pattern": "("},
        {"pattern": "^(a+)+$", "type": "string"},
        {"minLength": 10**9},
        {"maxItems": -1},
        {"type": 7},
        {"$ref": "#/x"},
        {"$ref": "#"},
        {"minimum": 1e308},
        {"format": "date"},
        {"multipleOf": 0},
        {"not": {}},
    ]
    if depth < 3 and random.random() < 0.6:
        inner = [schema(random, depth + 1) for _ in range(3)]
        return random.choice(
            [
                {"type": "object", "properties": {"a": inner[0], "b": inner[1]}, "required": ["a"]},
                {"type": "array", "items": inner[0]},
                {"anyOf": inner},
                {"allOf": inner},
                {"oneOf": inner},
                {"type": "array", "prefixItems": inner, "minItems": 2},
            ]
        )
    return random.choice(kinds)


def fuzz(client: httpx.Client, count: int) -> None:
    random = Random(count)
    for _ in range(count):
        body = CHAT | {"max_tokens": 5, "structured_outputs": {"json": schema(random)}}
        began = time.perf_counter()
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code in {200, 400}, (body, answer.text)
        assert time.perf_counter() - began < 3 * grammar.SECONDS


def test_strange_schemas_are_answered(server: Server) -> None:
    fuzz(server.http(), 40)
    server.settle()


def test_a_form_without_an_end_is_the_mistake_of_who_asks(server: Server) -> None:
    """Each object wants another one inside: the library finds out on the way."""
    endless = {"type": "object", "properties": {"a": {"$ref": "#"}, "b": {"enum": []}}, "required": ["a"]}
    statuses = set[int]()
    for seed in range(60):
        body = CHAT | {"max_tokens": 5, "seed": seed, "structured_outputs": {"json": endless}}
        answer = server.http().post("/v1/chat/completions", json=body)
        statuses.add(answer.status_code)
        if answer.status_code == 400:
            assert "no answer can keep the form" in answer.text
    assert statuses <= {200, 400}
    server.settle()


@pytest.mark.slow
def test_two_thousand_strange_schemas_are_answered(server: Server) -> None:
    fuzz(server.http(), 2000)
    server.settle()


def test_names_of_markers_in_a_form_are_text(server: Server) -> None:
    """The token of that name is no text, and would end the form unfinished."""
    marker = next(iter(server.service.tokenizer.markers))
    schema = SCHEMA | {"properties": {"a": {"const": f"x{marker}y"}}, "required": ["a"]}
    for body in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}},
        {"structured_outputs": {"choice": [json.dumps({"a": f"x{marker}y"})]}},
    ):
        answer = server.http().post("/v1/chat/completions", json=CHAT | {"max_tokens": 80} | body).json()
        assert json.loads(answer["choices"][0]["message"]["content"]) == {"a": f"x{marker}y"}
