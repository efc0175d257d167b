"""``consilium serve`` as its users start and stop it: a process, an address, a signal."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from consilium.checkpoint import store
from consilium.cli.main import main
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError
from consilium.serving.run import is_loopback, listening
from consilium.serving.worker import Worker
from serving.served import engine_of, serving
from small import DEEPSEEK, lively

pytestmark = pytest.mark.enable_socket


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("serve") / "tiny-model"
    store.save(lively(DEEPSEEK), made, tokenizer=Tokenizer.of_bytes())
    return made


PROGRAM = ("-m", "consilium", "serve")
SOAKED = (str(Path(__file__).parents[1] / "serving/soaked.py"),)
"""The same, which tells on SIGUSR2 what it holds."""


class Started:
    def __init__(self, folder: Path, *options: str, program: Sequence[str] = PROGRAM) -> None:
        command = [sys.executable, *program, str(folder), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.told: list[str] = []
        for line in self.process.stderr:
            self.told.append(line)
            if found := re.search(r"http://\S+(?=/v1)", line):
                self.url = found[0]
                break
        else:
            raise AssertionError("".join(self.told))
        self.rest = threading.Thread(target=lambda: self.told.extend(self.process.stderr or ()), daemon=True)
        self.rest.start()

    def end(self) -> str:
        self.process.wait(60)
        self.rest.join(10)
        return "".join(self.told)


@pytest.fixture
def start(folder: Path) -> Iterator[Any]:
    started: list[Started] = []

    def begin(*options: str) -> Started:
        started.append(Started(folder, *options))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.end()
        assert one.process.stderr is not None
        one.process.stderr.close()


def test_a_folder_is_served_until_a_signal(start: Any) -> None:
    server = start()
    found = httpx.get(f"{server.url}/v1/models", timeout=30).json()
    assert [model["id"] for model in found["data"]] == ["tiny-model"]
    body = {"prompt": "a", "max_tokens": 3, "temperature": 0}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    told = server.end()
    assert server.process.returncode == 0
    assert "Traceback" not in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_runs_finishes_and_who_comes_is_refused(number: signal.Signals, start: Any) -> None:
    server = start()
    body = {"prompt": "a", "max_tokens": 250, "temperature": 0, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        server.process.send_signal(number)
        rest = [line for line in lines if line]
    assert first.startswith("data: {")
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    server.end()
    assert server.process.returncode == 0


def test_a_second_signal_ends_it_at_once(start: Any) -> None:
    server = start()
    body = {"prompt": "a", "max_tokens": 250, "n": 8, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    server.end()
    assert server.process.returncode == 0


def test_options_reach_the_server(start: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n\ntwo\n")
    server = start(
        "--api-key-file",
        str(keys),
        "--served-model-name",
        "mine",
        "--max-model-len",
        "50",
        "--weights",
        "int8",
    )
    assert httpx.get(f"{server.url}/v1/models", timeout=30).status_code == 401
    model = httpx.get(f"{server.url}/v1/models", headers={"authorization": "Bearer two"}, timeout=30).json()[
        "data"
    ][0]
    assert (model["id"], model["max_model_len"]) == ("mine", 50)
    assert httpx.get(f"{server.url}/health", headers={"host": "evil.example"}, timeout=30).status_code == 421


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--host", "0.0.0.0"), "would be open to everybody; give --api-key"),
        (("--api-key", ""), "a key is empty and would"),
        (("--port", "70000"), "no port"),
        (("--max-queue", "-1"), "--max-queue"),
        (("--max-model-len", "0"), "too few"),
        (("--memory", "1MiB"), "is too little: weights of"),
        (("--memory", "5"), "size with its unit"),
        (("--api-key-file", "nowhere"), "cannot read the keys"),
        (("--weight", "int8"), "Did you mean"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_sentence(
    words: tuple[str, ...], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(folder), "--port", "0", *words]) == 2
    told = capsys.readouterr().err
    assert sentence in told, told
    assert "Traceback" not in told


def test_an_address_that_is_taken_is_told() -> None:
    with (
        listening("127.0.0.1", 0) as first,
        pytest.raises(ConsiliumError, match=r"cannot listen on 127\.0\.0\.1:\d+ \(address already in use\)"),
    ):
        listening("127.0.0.1", first.getsockname()[1])
    with pytest.raises(ConsiliumError, match=r"cannot listen on no\.such\.host"):
        listening("no.such.host.invalid", 0)


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("127.8.8.8", True),
        ("0.0.0.0", False),
        ("example.org", False),
    ],
)
def test_which_addresses_are_this_machine_alone(host: str, own: bool) -> None:
    assert is_loopback(host) == own


def saved(folder: Path, seed: int) -> None:
    store.save(lively(DEEPSEEK, seed), folder, tokenizer=Tokenizer.of_bytes())


def text_of(url: str, tokens: int = 5) -> str:
    body = {"prompt": [1, 70, 71], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]


def wait_until(told: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not told():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_new_checkpoint_is_read_while_others_are_answered(tmp_path: Path) -> None:
    """Who is being answered has the words of the model that began."""
    saved(tmp_path / "model", 0)
    server = Started(tmp_path / "model")
    try:
        whole, before = text_of(server.url, 220), text_of(server.url)
        body = {"prompt": [1, 70, 71], "max_tokens": 220, "temperature": 0, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}) as answer:
            lines = answer.iter_lines()
            got = [next(lines) for _ in range(4)]
            shutil.rmtree(tmp_path / "model")
            saved(tmp_path / "model", 1)
            server.process.send_signal(signal.SIGUSR1)
            wait_until(lambda: text_of(server.url) != before)
            got += lines
        pieces = [json.loads(line[6:]) for line in got if line.startswith("data: {")]
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole
        after = text_of(server.url)
        (tmp_path / "model/model.safetensors").write_bytes(b"damaged")
        server.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: "the model stays as it is" in "".join(server.told))
        assert text_of(server.url) == after
    finally:
        server.process.send_signal(signal.SIGTERM)
        told = server.end()
    assert server.process.returncode == 0, told
    assert "answers from now on" in told
    assert "Traceback" not in told
    assert server.process.stderr is not None
    server.process.stderr.close()


def test_the_service_before_ends_with_its_last_request() -> None:
    with serving() as server:
        before = server.current.service
        fresh = engine_of()
        after = dataclasses.replace(before, engine=fresh, worker=Worker(fresh, most_waiting=4))

        async def change() -> None:
            server.current.change(after)

        asyncio.run(change())
        thread = before.worker._thread
        assert thread.is_alive()
        ended = weakref.ref(before)
        del before
        wait_until(lambda: not thread.is_alive() and gc.collect() >= 0, 30)
        assert ended() is None
        assert server.client().models.list().data[0].id == "small"


@pytest.mark.slow
def test_schemathesis_finds_no_error_of_the_server(start: Any) -> None:
    """It reads the description that the server gives of itself, and tries what that allows and forbids."""
    program = Path(sys.executable).with_name("schemathesis")
    if not program.exists():
        pytest.skip("schemathesis is not installed")
    server = start()
    command = [str(program), "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error"]
    options = [
        "--max-examples",
        "40",
        "--phases",
        "coverage,fuzzing",
        "--no-color",
        "--generation-deterministic",
    ]
    found = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-4000:]
    assert "Unresolvable references" not in found.stdout
    assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200


def processes(server: Started) -> list[int]:
    """Of its workers."""
    return [
        int(pid)
        for pid in Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    ]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are read from /proc")
def test_workers_share_an_address_and_end_together(start: Any) -> None:
    server = start("--workers", "2", "--threads", "1")
    wait_until(lambda: "".join(server.told).count("/v1") == 2)
    assert len(workers := processes(server)) == 2
    assert len({text_of(server.url) for _ in range(12)}) == 1
    server.process.send_signal(signal.SIGTERM)
    told = server.end()
    assert server.process.returncode == 0, told
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are read from /proc")
@pytest.mark.parametrize("which", ["a worker", "the parent"])
def test_where_one_dies_all_end(which: str, start: Any) -> None:
    server = start("--workers", "2", "--threads", "1")
    workers = processes(server)
    os.kill(workers[0] if which == "a worker" else server.process.pid, signal.SIGKILL)
    told = server.end()
    assert ("a worker ended by itself (signal 9)" in told) == (which == "a worker")
    assert server.process.returncode == (1 if which == "a worker" else -signal.SIGKILL)
    wait_until(
        lambda: (
            not any(
                Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
                for pid in workers
            )
        )
    )


def test_a_mistake_of_all_workers_is_told_and_ends_them(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", str(folder), "--port", "0", "--workers", "2", "--memory", "1KB"]
    found = subprocess.run(
        [sys.executable, "-m", "consilium", *words], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert "is too little" in found.stderr
    assert "Traceback" not in found.stderr


def test_models_that_were_read_before_are_gone(tmp_path: Path) -> None:
    saved(tmp_path / "model", 0)
    server = Started(tmp_path / "model", program=SOAKED)
    try:
        text_of(server.url)
        for number in range(1, 4):
            server.process.send_signal(signal.SIGUSR1)
            wait_until(lambda n=number: "".join(server.told).count("answers from now on") == n)
            text_of(server.url)

        def services() -> str:
            server.process.send_signal(signal.SIGUSR2)
            wait_until(lambda: server.told[-1].startswith("soaked"))
            return server.told.pop().split()[-1]

        assert "1" in {services() for _ in range(3)}
    finally:
        server.process.send_signal(signal.SIGTERM)
        assert server.end()
    assert server.process.returncode == 0
    assert server.process.stderr is not None
    server.process.stderr.close()
