"""A server of a small model in this process, behind a socket that no other machine sees."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import uvicorn

from consilium.config.model import Model
from consilium.data.template import Template
from consilium.data.tokenizer import Tokenizer
from consilium.engine.chat import Format, Questions, Templated
from consilium.engine.engine import Engine
from consilium.serving.answers import Spelling
from consilium.serving.app import build_app
from consilium.serving.connection import QUIET
from consilium.serving.gate import Gate
from consilium.serving.grammar import Grammars
from consilium.serving.limits import Settings
from consilium.serving.metrics import Metrics
from consilium.serving.service import Current, Service
from consilium.serving.worker import Worker
from small import DEEPSEEK, lively

NAME = "small"


@dataclass(frozen=True)
class Server:
    path: str
    current: Current
    gate: Gate
    clients: contextlib.ExitStack
    """Closed with the server."""

    @property
    def service(self) -> Service:
        return self.current.service

    @property
    def engine(self) -> Engine:
        return self.service.engine

    def http(self, **options: Any) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=self.path)
        made = httpx.Client(transport=transport, base_url="http://localhost", timeout=60, **options)
        self.clients.callback(made.close)
        return made

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(
            base_url="http://localhost/v1", api_key=key, max_retries=0, http_client=self.http()
        )

    def connection(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(30)
        made.connect(self.path)
        return made

    def settle(self, seconds: float = 10.0) -> None:
        """Wait until nothing runs, waits or holds a page that is not kept for a beginning."""
        until = time.monotonic() + seconds
        while self.engine.busy or self.service.worker.active or self.gate.busy:
            assert time.monotonic() < until, "something is left"
            time.sleep(0.01)


def engine_of(config: Model = DEEPSEEK, **options: Any) -> Engine:
    model = lively(dataclasses.replace(config, max_length=options.pop("length", 2048)))
    return Engine(model, Tokenizer.of_bytes(), **options)


@contextlib.contextmanager
def serving(
    engine: Engine | None = None,
    *,
    hosts: frozenset[str] | None = None,
    template: str | None = None,
    **settings: Any,
) -> Iterator[Server]:
    engine = engine or engine_of()
    given = Settings(**({"name": NAME} | settings))
    worker = Worker(engine, most_waiting=given.most_waiting)
    tokenizer = engine.tokenizer
    assert isinstance(tokenizer, Tokenizer)
    grammars = Grammars(tokenizer, engine.model.config.vocab_size, engine.stop_ids)
    metrics = Metrics(given.name)
    form: Format = Questions(tokenizer)
    if template is not None:
        form = Templated(Template(template, "here"), tokenizer, ())
    current = Current(Service(engine, worker, tokenizer, form, given, metrics, grammars, Spelling(tokenizer)))
    gate = Gate(build_app(current, lambda: not gate.draining, lambda: None), given.keys, hosts)
    config = uvicorn.Config(gate, **QUIET | {"log_level": "critical"}, lifespan="on")
    server = uvicorn.Server(config)
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = str(Path(folder) / "s")
        listener.bind(path)
        listener.listen(1024)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            with contextlib.ExitStack() as clients:
                yield Server(path, current, gate, clients)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
