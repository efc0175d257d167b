"""Clients that leave, that are too many, that share a batch with one that fails: nobody else notices."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import httpx2 as httpx
import pytest
import torch
from torch import Tensor

from consilium.engine import rows
from consilium.engine.batch import Batch
from consilium.engine.engine import Engine
from consilium.engine.rows import Row
from consilium.serving import app
from serving.served import Server, engine_of, serving

COMPLETIONS = "/v1/completions"
CONTROL = {"prompt": [1, 70, 71], "max_tokens": 30, "temperature": 0, "ignore_eos": True}


def pages(server: Server) -> int:
    """Those that somebody owns and that are not kept for a beginning alone."""
    batch: Any = server.engine._batch  # pyright: ignore[reportPrivateUsage]
    return batch._pages.total - batch._pages.free - batch._prefixes.pages


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def raw(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def leave(server: Server, count: int) -> None:
    """Clients that go at once, while they wait, in the prompt, in the answer or near its end."""
    random = Random(count)
    for _ in range(count):
        long = random.random() < 0.5
        body = {
            "prompt": [1] + [random.randrange(60, 200) for _ in range(1500 if long else 5)],
            "max_tokens": 400,
            "stream": random.random() < 0.5,
            "n": random.choice([1, 1, 3]),
            "ignore_eos": True,
        }
        with server.connection() as sent:
            sent.sendall(raw(body))
            if body["stream"] and random.random() < 0.5:
                sent.recv(random.choice([1, 300, 2000]))
            else:
                time.sleep(random.choice([0, 0.002, 0.02, 0.05]))


def check_leaving(server: Server, count: int) -> None:
    with server.http() as client:
        right = client.post(COMPLETIONS, json=CONTROL).json()["choices"]
        with ThreadPoolExecutor(1) as other:
            leaving = other.submit(leave, server, count)
            while not leaving.done():
                assert client.post(COMPLETIONS, json=CONTROL).json()["choices"] == right
            leaving.result()
    server.settle()
    assert pages(server) == 0


def test_who_leaves_takes_nothing_along(server: Server) -> None:
    check_leaving(server, 30)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_who_leave_take_nothing_along(server: Server) -> None:
    check_leaving(server, 1000)


@pytest.mark.parametrize("stream", [True, False])
def test_a_slot_is_free_within_a_step(stream: bool, server: Server) -> None:
    body = {"prompt": [1, 60], "max_tokens": 2000, "stream": stream, "ignore_eos": True}
    with server.connection() as sent:
        sent.sendall(raw(body))
        while not server.engine.running:
            time.sleep(0.001)
    began = time.monotonic()
    while server.engine.running or server.gate.busy:
        assert time.monotonic() - began < 2
        time.sleep(0.001)


def test_too_many_are_refused_at_once_and_the_others_are_answered() -> None:
    with serving(engine_of(most_rows=2), most_waiting=2) as server, server.http() as client:
        slow = {"prompt": [1, 60], "max_tokens": 400, "ignore_eos": True, "temperature": 0}
        with ThreadPoolExecutor(4) as others:
            running = [others.submit(server.http().post, COMPLETIONS, json=slow) for _ in range(4)]
            while server.service.worker.active < 4:
                time.sleep(0.001)
            times = []
            for _ in range(20):
                began = time.perf_counter()
                answer = client.post(COMPLETIONS, json=CONTROL)
                times.append(time.perf_counter() - began)
                assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
                assert answer.json()["error"]["code"] == "overloaded"
            answers = [one.result().json()["choices"][0]["text"] for one in running]
        assert len(set(answers)) == 1
        assert client.post(COMPLETIONS, json=CONTROL).status_code == 200
        assert sorted(times)[10] < 0.25


def test_one_request_may_ask_for_no_more_sequences_than_there_is_room() -> None:
    with serving(engine_of(most_rows=2), most_waiting=2) as server, server.http() as client:
        answer = client.post(COMPLETIONS, json=CONTROL | {"n": 5})
        assert answer.status_code == 400, "asking again would not help"
        assert "5 sequences in one request are more than the 4" in answer.json()["error"]["message"]
        assert client.post(COMPLETIONS, json=CONTROL | {"n": 4}).status_code == 200


def together(server: Server, prompts: list[list[int]]) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(prompts)) as clients:
        sent = [
            clients.submit(server.http().post, COMPLETIONS, json=CONTROL | {"prompt": prompt})
            for prompt in prompts
        ]
        return [one.result() for one in sent]


@pytest.mark.parametrize("place", [0, 4, 2])
def test_one_that_fails_harms_no_other(place: int, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its prompt, in a pass that all share, and where its token is drawn."""
    prompts = [[1, 90 + i, 100 + place] for i in range(8)]
    right = [one.json()["choices"] for one in together(server, prompts)]
    bad = prompts[place][1]

    def is_bad(row: Row) -> bool:
        return row.tokens[1] == bad and row.tokens[2] == 100 + place

    read, decode, advance = Batch.read, Batch.decode, rows.advance

    def reading(self: Batch, row: Row) -> Tensor | None:
        if is_bad(row):
            raise RuntimeError("injected")
        return read(self, row)

    def decoding(self: Batch, some: list[Row], guesses: Any) -> Any:
        if any(is_bad(row) and len(row.tokens) > 5 + place for row in some):
            raise RuntimeError("injected")
        return decode(self, some, guesses)

    def advancing(row: Row, logits_V: Tensor, *rest: Any) -> Any:
        broken = is_bad(row) and len(row.tokens) > 4
        return advance(row, torch.full_like(logits_V, torch.nan) if broken else logits_V, *rest)

    patch: Any = [(Batch, "read", reading), (Batch, "decode", decoding)]
    target, name, change = [*patch, ("consilium.engine.engine", "advance", advancing)][place % 3]
    if isinstance(target, str):
        monkeypatch.setattr(f"{target}.{name}", change)
    else:
        monkeypatch.setattr(target, name, change)
    answers = together(server, prompts)
    assert [one.status_code for one in answers] == [500 if i == place else 200 for i in range(8)]
    found = [one.json().get("choices") for one in answers]
    assert found[:place] + found[place + 1 :] == right[:place] + right[place + 1 :]
    monkeypatch.undo()
    server.settle()
    assert pages(server) == 0


def test_a_fault_of_ours_ends_what_runs_and_not_the_server(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = server.http().post(COMPLETIONS, json=CONTROL).json()["choices"]
    step, left = Engine.step, [5]

    def failing(self: Engine) -> Any:
        left[0] -= 1
        if not left[0]:
            raise AssertionError("injected")
        return step(self)

    monkeypatch.setattr(Engine, "step", failing)
    answers = together(server, [[1, 70, 71]] * 3)
    assert {answer.status_code for answer in answers} <= {200, 500}
    assert [answer.status_code for answer in answers].count(500) >= 1
    assert server.http().post(COMPLETIONS, json=CONTROL).json()["choices"] == right
    server.settle()
    assert pages(server) == 0


def test_minus_infinity_is_a_number_of_json(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = rows.advance

    def masked(row: Row, logits_V: Tensor, *rest: Any) -> Any:
        return advance(row, logits_V.index_fill(0, torch.arange(3, 300), -torch.inf), *rest)

    monkeypatch.setattr("consilium.engine.engine.advance", masked)
    answer = server.http().post(COMPLETIONS, json=CONTROL | {"logprobs": 5, "max_tokens": 2})
    found = json.loads(answer.text, parse_constant=pytest.fail)
    values = [value for top in found["choices"][0]["logprobs"]["top_logprobs"] for value in top.values()]
    assert -9999.0 in values
    assert all(math.isfinite(value) for value in values)


def test_a_stream_that_waits_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "COMMENT_SECONDS", 0.05)
    read = Batch.read

    def slowly(self: Batch, row: Row) -> Tensor | None:
        time.sleep(0.4)
        return read(self, row)

    monkeypatch.setattr(Batch, "read", slowly)
    began = time.perf_counter()
    with (
        server.http() as client,
        client.stream("POST", COMPLETIONS, json=CONTROL | {"stream": True}) as answer,
    ):
        assert time.perf_counter() - began < 0.3, "headers come before the prompt is read"
        text = "".join(answer.iter_text())
    assert 3 <= text.count(": still at work\n\n") <= 9
    assert text.endswith("data: [DONE]\n\n")


def test_an_answer_that_takes_too_long_is_ended() -> None:
    with serving(seconds=0.3) as server, server.http() as client:
        body = {"prompt": [1, 60], "max_tokens": 2000, "ignore_eos": True}
        assert client.post(COMPLETIONS, json=body).status_code == 408
        with client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as answer:
            events = [line for line in answer.iter_lines() if line]
        assert '"code": "timeout"' in events[-2]
        assert events[-1] == "data: [DONE]"
        server.settle()
        assert pages(server) == 0


def test_who_does_not_read_delays_nobody(server: Server) -> None:
    body = {"prompt": [1, 60], "max_tokens": 2000, "stream": True, "ignore_eos": True, "logprobs": 20}
    readers = [server.connection() for _ in range(4)]
    try:
        for reader in readers:
            reader.sendall(raw(body))
        with server.http() as client:
            for _ in range(5):
                assert client.post(COMPLETIONS, json=CONTROL).status_code == 200
    finally:
        for reader in readers:
            reader.close()
    server.settle(60)
    assert pages(server) == 0


@pytest.mark.parametrize(
    "count", [15, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_many_prompts_stay_within_the_cache_that_was_given(count: int) -> None:
    engine = engine_of(most_tokens=4096)
    batch: Any = engine._batch  # pyright: ignore[reportPrivateUsage]
    random = Random(0)
    with serving(engine) as server, server.http() as client:
        for asked in range(count):
            if asked == 10:
                before = resident()
            prompt = [1] + [random.randrange(60, 200) for _ in range(random.choice([600, 1300]))]
            assert client.post(COMPLETIONS, json={"prompt": prompt, "max_tokens": 2}).status_code == 200
        assert batch._pages.total == 64
        assert resident() - before < 32 * 2**20
        message = client.post(COMPLETIONS, json={"prompt": [1] * 2000, "max_tokens": 48}).status_code
        assert message == 200


def test_text_is_the_same_at_every_cut(server: Server) -> None:
    """Bytes that are no characters, and characters of several: streamed parts join to the whole."""
    random = Random(0)
    with server.http() as client:
        for _ in range(8):
            body = {
                "prompt": [1, random.randrange(60, 250)],
                "max_tokens": 60,
                "temperature": 3.0,
                "seed": random.randrange(99),
            }
            whole = client.post(COMPLETIONS, json=body).json()["choices"][0]["text"]
            with client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as answer:
                parts = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
            assert "".join(part["choices"][0]["text"] for part in parts) == whole


def test_equal_ids_of_clients_cross_no_tokens(server: Server) -> None:
    """Each prompt forces its own token by a bias, which its answer has to be made of."""

    def ask(token: int) -> bool:
        body = {
            "prompt": [1, 60],
            "max_tokens": 5,
            "logit_bias": {str(token): 100},
            "user": "same",
            "temperature": 0,
        }
        found = server.http().post(COMPLETIONS, json=body, headers={"x-request-id": "same"}).json()
        return found["choices"][0]["text"] == server.service.tokenizer.decode([token] * 5)

    with ThreadPoolExecutor(8) as clients:
        assert all(clients.map(ask, [65 + i % 26 for i in range(24)]))


def test_the_loop_is_not_blocked_by_a_long_step(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step
    stepping = threading.Event()

    def slowly(self: Engine) -> Any:
        stepping.set()
        time.sleep(0.5)
        return step(self)

    monkeypatch.setattr(Engine, "step", slowly)
    with ThreadPoolExecutor(1) as other, server.http() as client:
        running = other.submit(server.http().post, COMPLETIONS, json=CONTROL | {"max_tokens": 1})
        stepping.wait()
        began = time.perf_counter()
        assert client.get("/health").status_code == 200
        assert client.post(COMPLETIONS, json=CONTROL | {"n": 0}).status_code == 400
        assert time.perf_counter() - began < 0.4
        assert running.result().status_code == 200
