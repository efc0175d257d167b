"""A server under mixed load for a long time, and at ten times what it can do."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx2 as httpx
import pytest

from consilium.checkpoint import store
from consilium.config.feed_forward import FeedForward
from consilium.config.model import MTP, Model
from consilium.data.tokenizer import Tokenizer
from small import DEEPSEEK, lively

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket]

MINUTES = float(os.environ.get("CONSILIUM_SOAK_MINUTES", "20"))
"""Of which the first quarter warms up."""
GROWTH = 8 * 2**20
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}


@dataclass
class Process:
    """A server in a process of its own, and what it says."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)

    def measured(self) -> tuple[int, int]:
        """Objects of Python, and bytes of memory."""
        before = sum(line.startswith("soaked") for line in self.lines)
        self.process.send_signal(signal.SIGUSR2)
        until = time.monotonic() + 30
        while sum(line.startswith("soaked") for line in self.lines) == before:
            assert time.monotonic() < until
            time.sleep(0.05)
        _, objects, resident, _ = next(
            line for line in reversed(self.lines) if line.startswith("soaked")
        ).split()
        return int(objects), int(resident)

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def begin(*options: str, config: Model = DEEPSEEK) -> Process:
        store.save(lively(config), tmp_path / "model", tokenizer=Tokenizer.of_bytes())
        script = Path(__file__).with_name("soaked.py")
        command = [sys.executable, str(script), str(tmp_path / "model"), "--port", "0", *options]
        environment = {name: value for name, value in os.environ.items() if name != "CONSILIUM_NATIVE"}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert process.stderr is not None
        told = (re.search(r"http://\S+(?=/v1)", line) for line in process.stderr)
        found = Process(process, next(found[0] for found in told if found))
        threading.Thread(target=lambda: found.lines.extend(process.stderr or ()), daemon=True).start()
        started.append(found)
        return found

    yield begin
    for one in started:
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(60) == 0, "".join(one.lines)
        assert one.process.stderr is not None
        one.process.stderr.close()


def asked(random: Random) -> tuple[str, dict[str, Any]]:
    """One of some hundred requests of every kind, of which some are none."""
    prompt = [1, *(60 + random.randrange(8) for _ in range(random.choice((1, 5, 40, 120))))]
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": random.choice((1, 8, 40)), "seed": 0}
    match random.randrange(8):
        case 0:
            return "/v1/embeddings", {"input": [prompt[:9], "text"]}
        case 1:
            return "/v1/completions", body | {"structured_outputs": {"json": SCHEMA}, "max_tokens": 30}
        case 2:
            return "/v1/completions", body | {"n": 2, "logprobs": 3, "echo": True}
        case 3:
            return "/v1/completions", body | {"max_tokens": -1}
        case 4:
            return "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
        case 5:
            return "/v1/completions", body | {"return_routed_experts": True, "mute_experts": [[1, 2]]}
        case _:
            return "/v1/completions", body | {"stream": True}


def load(url: str, until: float, seed: int) -> Counter[int]:
    """Ask without a pause; one in ten leaves before the answer is whole."""
    random, seen = Random(seed), Counter[int]()
    with httpx.Client(base_url=url, timeout=600) as client:
        while time.monotonic() < until:
            path, body = asked(random)
            with client.stream("POST", path, json=body) as answer:
                seen[answer.status_code] += 1
                leaves = random.random() < 0.1
                for _ in answer.iter_raw():
                    if leaves:
                        break
    return seen


def loaded(server: Process, seconds: float, clients: int) -> Counter[int]:
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(clients) as pool:
        found = sum(pool.map(lambda seed: load(server.url, until, seed), range(clients)), Counter[int]())
    while server.metric("consilium:num_requests_running") + server.metric("consilium:num_requests_waiting"):
        time.sleep(0.05)
    return found


@pytest.mark.timeout(60 * (MINUTES + 5))
def test_a_long_mixed_load_leaves_nothing_behind(start: Callable[..., Process]) -> None:
    """Memory grows by less than 8 MB after the first quarter; objects and pages stay as many."""
    server = start("--memory", "600MB", "--max-queue", "64")
    seen, measured, pages = Counter[int](), [], []
    for _ in range(4):
        seen += loaded(server, MINUTES * 15, 6)
        measured.append(server.measured())
        pages.append(server.metric("consilium:kv_cache_usage_perc"))
    assert set(seen) <= {200, 400}
    assert seen[200] > 20 * MINUTES
    objects, resident = zip(*measured, strict=True)
    print(f"{seen=} {objects=} {resident=} {pages=}")
    assert resident[-1] - resident[0] < GROWTH
    assert objects[-1] - objects[0] < 500, "as many as a few caches of the library take"
    assert pages[-1] <= pages[0] + 0.01
    assert "Traceback" not in "".join(server.lines)


HEAVY = dataclasses.replace(
    DEEPSEEK,
    hidden_size=512,
    layers=12,
    dense=FeedForward(width=2048),
    moe=dataclasses.replace(DEEPSEEK.moe, width=1024),
    mtp=MTP(depth=0),
)

CLIENT = """
import http.client, json, sys, time
host, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
body = json.dumps({"prompt": [1, 60, 61], "max_tokens": 60, "ignore_eos": True, "temperature": 0})
until, times, codes = time.monotonic() + seconds, [], []
while time.monotonic() < until:
    began = time.perf_counter()
    connection = http.client.HTTPConnection(host, port, timeout=60)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    codes.append(answer.status)
    connection.close()
    if answer.status == 429:
        times.append(time.perf_counter() - began)
    time.sleep(0.002)
print(json.dumps([times, codes]))
"""


def accepted(url: str, seconds: float, clients: int) -> list[float]:
    """How long answers took whose clients keep the server as busy as it can be."""
    until, times = time.monotonic() + seconds, list[float]()

    def ask() -> None:
        body = {"prompt": [1, 60, 61], "max_tokens": 60, "ignore_eos": True, "temperature": 0}
        with httpx.Client(base_url=url, timeout=60) as client:
            while time.monotonic() < until:
                began = time.perf_counter()
                if client.post("/v1/completions", json=body).status_code == 200:
                    times.append(time.perf_counter() - began)
                else:
                    time.sleep(0.05)

    with ThreadPoolExecutor(clients) as pool:
        for _ in range(clients):
            pool.submit(ask)
    return sorted(times)


def share(times: list[float], part: float) -> float:
    return sorted(times)[min(int(part * len(times)), len(times) - 1)]


@pytest.mark.timeout(300)
def test_at_ten_times_the_load_refusals_are_fast_and_answers_take_no_longer(
    start: Callable[..., Process],
) -> None:
    """Those who are refused are niced: they are not what is measured.

    The model is one whose steps are the kernels' and not Python's.
    """
    server = start("--max-queue", "0", "--max-num-seqs", "4", "--dtype", "bfloat16", config=HEAVY)
    alone = accepted(server.url, 15, 4)
    host, port = server.url.removeprefix("http://").split(":")
    command = ["nice", "-n", "10", sys.executable, "-c", CLIENT, host, port, "15"]
    crowd = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    beside = accepted(server.url, 15, 4)
    found = [json.loads(one.communicate()[0]) for one in crowd]
    refused = [seconds for times, _ in found for seconds in times]
    codes = Counter(code for _, some in found for code in some)
    ratio = share(beside, 0.99) / share(alone, 0.99)
    print(f"{codes=} p50 {statistics.median(refused):.4f} p99 {share(refused, 0.99):.4f} {ratio=:.2f}")
    assert set(codes) <= {200, 429}
    assert codes[429] > 10 * len(beside) / 4
    assert statistics.median(refused) < 0.05
    assert share(refused, 0.99) < 0.25
    assert ratio < 1.2
