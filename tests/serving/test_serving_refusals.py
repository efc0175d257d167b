"""What a server does not take: each is an error of HTTP in one sentence, and the next request is answered."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from random import Random
from typing import Any

import httpx2 as httpx
import pytest

from consilium.serving import connection, gate
from consilium.serving.app import build_app
from consilium.serving.limits import BODY, DEPTH
from serving.served import NAME, Server, engine_of, serving

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
CONTROL = {"prompt": "def add(", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        right = client.post(COMPLETIONS, json=CONTROL).json()["choices"]
        yield client
        assert client.post(COMPLETIONS, json=CONTROL).json()["choices"] == right


def refused(answer: httpx.Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return str(error["message"])


HUGE = (-1, 2**31, 2**63, 10**30, 1.5, "", "7", [], {}, float("nan"))
FIELDS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "max_tokens": ((0, 1, None), HUGE),
    "n": ((1, 8, None), (0, 9, *HUGE)),
    "best_of": ((1, 8, None), (0, 9, *HUGE)),
    "logprobs": ((0, 20, None), (21, *HUGE)),
    "temperature": ((0, 0.5, 100, None), (-0.1, 100.1, "1", [], 1e300)),
    "top_p": ((0.1, 1, None), (0, 1.1, "1", [])),
    "top_k": ((-1, 0, 1, 2**20, None), (-2, *HUGE[1:])),
    "min_p": ((0, 1, None), (-0.1, 1.1, "0")),
    "presence_penalty": ((-2, 2, None), (-2.1, 2.1, "0")),
    "frequency_penalty": ((-2, 2, None), (-2.1, 2.1, "0")),
    "repetition_penalty": ((0.5, 1, 100, None), (0, -1, 101, "1")),
    "seed": ((0, -1, 2**63, None), (2**64, 1.5, "1")),
    "stop": (("a", ["a"] * 16, None, []), ("", [""], ["a"] * 17, "a" * 257, 5, [5])),
    "stop_token_ids": (([], [1] * 16, None), ([-1], [2**31], [1] * 17, "1")),
    "logit_bias": (({}, {"5": 1}, None), ({"a": 1}, {"300": 1}, {"5": 101}, {"-1": 0}, {"5": "x"}, [5])),
    "prompt": (
        ("a", [1], ["a", "b"], [[1], [2, 3]]),
        ([], [[]], [1, "a"], [300], [-1], None, 5, {"a": 1}, ["a"] * 257),
    ),
    "echo": ((True, False, None), (1, "true")),
    "stream": ((False, None), (1, "false")),
    "suffix": ((None,), ("x",)),
    "model": ((NAME, None), (5, [])),
    "experts_per_token": ((1, 2, None), (0, *HUGE)),
    "mute_experts": (([], [[1, 7]], None), ([[1]], [[1, -1]], [[1, 2**31]], 5, [[1, 2]] * 4097)),
    "replay_routed_experts": (
        ([[[0, 1], [2, 3]]] * 9, None),
        ([], [[]], [[[0.5, 1], [0, 1]]], "all", 5),
    ),
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_has_its_limits(field: str, http: httpx.Client) -> None:
    good, bad = FIELDS[field]
    for value in good:
        body = CONTROL | {"max_tokens": 1, field: value}
        if field == "best_of":
            body |= {"n": 1}
        assert http.post(COMPLETIONS, json=body).status_code == 200, value
    for value in bad:
        text = json.dumps(CONTROL | {field: value})
        answer = http.post(COMPLETIONS, content=text, headers={"content-type": "application/json"})
        assert field in refused(answer) or "JSON" in answer.text or "prompt" in answer.text, value


def test_an_unknown_field_is_told_the_nearest(http: httpx.Client) -> None:
    message = refused(http.post(COMPLETIONS, json=CONTROL | {"max_token": 4}))
    assert message == "unknown field 'max_token'. Did you mean 'max_tokens'?"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", [-1, 5], "prompt.0: Input should be greater than or equal to 0"),
        ("prompt", [], "prompt: List should have at least 1 item after validation, not 0"),
        ("stop", [""], "stop.0: String should have at least 1 character"),
        ("prompt", 3, "prompt: Input should be a valid string"),
    ],
    ids=repr,
)
def test_a_value_of_several_types_is_judged_as_what_it_is(
    field: str, value: object, message: str, http: httpx.Client
) -> None:
    assert refused(http.post(COMPLETIONS, json=CONTROL | {field: value})) == message


def test_another_model_is_not_served(http: httpx.Client) -> None:
    answer = http.post(COMPLETIONS, json=CONTROL | {"model": "gpt-4"})
    assert "only 'small'" in refused(answer, 404)
    assert answer.json()["error"]["code"] == "model_not_found"


def test_an_over_long_prompt_names_both_lengths(http: httpx.Client) -> None:
    for path, body in (
        (COMPLETIONS, {"prompt": [1] * 2040, "max_tokens": 9}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 3000}]}),
        ("/v1/embeddings", {"input": [[1] * 2049]}),
    ):
        message = refused(http.post(path, json=body))
        assert "2048" in message
        assert "20" in message.replace("2048", "") or "30" in message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": ' + b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1) + b"}",
        b'{"prompt": "' + b'\\"' * 100_000,
        b"{" * 1000 + b"}" * 1000,
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_no_json_is_refused_at_once(body: bytes, http: httpx.Client) -> None:
    began = time.perf_counter()
    refused(http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"}))
    assert time.perf_counter() - began < 2


def test_what_is_not_closed_is_told_as_that(http: httpx.Client) -> None:
    for body in (b'{"prompt":', b'{"prompt": [[1, 2]', b'{"prompt": "a"'):
        message = refused(http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"}))
        assert message.startswith("the body is no JSON: ")


def test_a_deep_body_within_the_limit_is_parsed(http: httpx.Client) -> None:
    body = {"metadata": {"a": json.loads("[" * (DEPTH - 2) + "]" * (DEPTH - 2))}}
    assert http.post(COMPLETIONS, json=CONTROL | body).status_code == 200


def test_a_body_that_is_too_large_is_not_read(http: httpx.Client) -> None:
    headers = {"content-type": "application/json", "content-length": str(BODY + 1)}
    assert "bytes" in refused(http.post(COMPLETIONS, content=b" " * (BODY + 1), headers=headers), 413)
    parts = iter([b" " * 2**16] * (BODY // 2**16 + 1))
    answer = http.post(COMPLETIONS, content=parts, headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    with server.connection() as sent:
        sent.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert sent.recv(100).startswith(b"HTTP/1.1 408")


_ASKS = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("before", [b"", _ASKS + b"\r\n"], ids=["at-first", "after-an-answer"])
def test_headers_that_do_not_end_are_not_waited_for(
    before: bytes, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    with server.connection() as sent:
        sent.sendall(before)
        answered = sent.recv(4096) if before else b""
        assert answered.startswith(b"HTTP/1.1 200") or not before
        sent.sendall(_ASKS)
        begun = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - begun < 9:
                sent.sendall(b"X-A: b\r\n")
                time.sleep(0.05)
        assert 0.3 < time.monotonic() - begun < 5


def test_a_connection_that_says_nothing_is_closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.2)
    with server.connection() as sent:
        assert sent.recv(100) == b""


def test_an_answer_may_take_longer_than_headers(
    server: Server, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.05)
    asked = CONTROL | {"max_tokens": 400, "stream": True, "ignore_eos": True}
    begun = time.monotonic()
    answered = http.post(COMPLETIONS, json=asked)
    assert answered.text.rstrip().endswith("[DONE]")
    assert time.monotonic() - begun > 0.1, "else the test shows nothing"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"]
)
def test_a_form_of_a_web_page_is_refused(kind: str, http: httpx.Client) -> None:
    refused(http.post(COMPLETIONS, content=json.dumps(CONTROL), headers={"content-type": kind}), 415)


def test_headers_have_a_limit(http: httpx.Client) -> None:
    assert http.get("/v1/models", headers={f"x-{i}": "a" for i in range(70)}).status_code == 431
    assert http.get("/v1/models", headers={"x": "a" * 17_000}).status_code == 431


def test_other_paths_and_methods_are_told(http: httpx.Client) -> None:
    assert http.get("/v1/nothing").status_code == 404
    assert http.get(COMPLETIONS).status_code == 405
    assert "error" in http.get("/v1/nothing").json()


def test_a_page_elsewhere_cannot_reach_a_server_of_this_machine() -> None:
    with serving(hosts=frozenset({"localhost", "127.0.0.1"})) as server, server.http() as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"host": "127.0.0.1:8000"}).status_code == 200
        assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 421
        answer = client.options(COMPLETIONS, headers={"origin": "http://evil.example"})
        assert not any("access-control" in name for name in answer.headers)


def test_every_path_but_health_needs_a_key() -> None:
    with serving(keys=("one", "two")) as server, server.http() as client:
        paths = [route.path for route in build_app(server.current, lambda: True, lambda: None).routes]
        assert {"/v1/completions", "/metrics", "/openapi.json", "/tokenize"} <= set(paths)
        for path in (*paths, "/v1/nothing"):
            for header in ({}, {"authorization": "Bearer three"}, {"authorization": "Bearer"}):
                for method in ("GET", "POST"):
                    status = client.request(method, path, headers=header).status_code
                    assert (status == 401) == (path not in gate.OPEN), (path, header)
        assert {"/health", *gate.PAGE} == gate.OPEN
        assert [
            client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code
            for key in ("one", "two")
        ] == [200, 200]
        assert server.client("two").completions.create(model=NAME, prompt="a", max_tokens=1).choices


def test_beginnings_are_shared_within_a_key_alone() -> None:
    prompt = [1] + [70 + i % 90 for i in range(600)]
    with serving(engine_of(most_tokens=8192), keys=("one", "two")) as server:
        counts = []
        for key in ("one", "two", "one", "two"):
            usage = server.client(key).completions.create(model=NAME, prompt=prompt, max_tokens=1).usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            counts.append(usage.prompt_tokens_details.cached_tokens)
    assert counts == [0, 0, 512, 512]


def junk(random: Random, depth: int = 0) -> Any:
    kinds: list[Any] = [
        None,
        True,
        0,
        -1,
        1,
        2**31,
        2**63,
        1e308,
        -0.0,
        "",
        "a",
        "\x00",
        "\ufffd",
        "é" * 50,
        "🙂",
        [],
        {},
    ]
    if depth < 3 and random.random() < 0.4:
        if random.random() < 0.5:
            return [junk(random, depth + 1) for _ in range(random.randrange(4))]
        return {
            random.choice(["role", "content", "type", "text", "x", ""]): junk(random, depth + 1)
            for _ in range(3)
        }
    return random.choice(kinds)


def fuzz(server: Server, requests: int) -> None:
    random, names = (
        Random(requests),
        [*FIELDS, "messages", "top_logprobs", "tools", "input", "tokens", "user"],
    )
    good = {name: [value for value in values if value is not None] for name, (values, _) in FIELDS.items()}
    good["messages"] = [[{"role": "user", "content": "hi"}], [{"role": "assistant", "content": None}]]
    paths = [COMPLETIONS, CHAT, "/v1/embeddings", "/tokenize", "/detokenize"]
    with server.http() as client:
        right = client.post(COMPLETIONS, json=CONTROL).json()["choices"]
        for number in range(requests):
            body: Any = {"max_tokens": 2, random.choice(["prompt", "messages", "input"]): "a"}
            for name in random.sample(names, random.randrange(5)):
                valid = random.random() < 0.5 and good.get(name)
                body[name] = random.choice(good[name]) if valid else junk(random)
            body = junk(random) if random.random() < 0.05 else body
            answer = client.post(random.choice(paths), json=body, timeout=20)
            assert answer.status_code < 500, (body, answer.text)
            if answer.status_code != 200:
                assert answer.json()["error"]["message"], body
            elif "text/event-stream" not in answer.headers["content-type"]:
                json.loads(answer.text, parse_constant=pytest.fail)
            if number % 100 == 0:
                assert client.post(COMPLETIONS, json=CONTROL).json()["choices"] == right
    server.settle()


def test_five_hundred_strange_requests_are_answered(server: Server) -> None:
    fuzz(server, 500)


@pytest.mark.slow
def test_ten_thousand_strange_requests_are_answered(server: Server) -> None:
    fuzz(server, 10_000)


def test_what_is_not_http_is_answered_or_dropped(server: Server) -> None:
    random = Random(0)
    for _ in range(30):
        with server.connection() as sent:
            sent.sendall(random.randbytes(random.randrange(1, 2000)) + b"\r\n\r\n")
            sent.shutdown(socket.SHUT_WR)
            found = sent.recv(1000)
            assert not found or found.startswith(b"HTTP/1.1 4"), found
    assert server.http().get("/health").status_code == 200
