"""A server from its first to its last moment: its address, its signals, and how it lets go."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
from collections.abc import Callable
from typing import Final, final

import uvicorn

from consilium.errors import ConsiliumError
from consilium.serving.app import build_app
from consilium.serving.gate import Gate
from consilium.serving.limits import BODY_SECONDS
from consilium.serving.service import Service

_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""Of a server that this machine alone reaches: a web page elsewhere may resolve its own name to it."""
_LAST_SECONDS: Final = 2


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listening(host: str, port: int) -> socket.socket:
    """Raises ConsiliumError for an address that cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ConsiliumError(
            f"cannot listen on {host}:{port} ({_why(error)}); give another --host or --port."
        ) from None


def _why(error: OSError) -> str:
    """create_server repeats the address in its own words; a name that nobody knows has no number of errno."""
    number = error.errno or 0
    return (os.strerror(number) if number > 0 else error.strerror or str(error)).lower()


def serve(service: Service, listener: socket.socket, *, host: str) -> None:
    """Answer requests until a signal, then let those that run finish."""
    stopping = _Stopping(service)
    app = build_app(service, lambda: not gate.draining, stopping.watch)
    gate = Gate(app, service.settings.keys, _NAMES | {host.lower()} if is_loopback(host) else None)
    config = uvicorn.Config(
        gate,
        http="h11",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=int(BODY_SECONDS),
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    server = uvicorn.Server(config)
    stopping.gate, stopping.exit = gate, lambda: setattr(server, "should_exit", True)
    server.run(sockets=[listener])


@final
class _Stopping:
    """The first signal refuses what comes and waits for what runs; the second ends that too."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.gate: Gate | None = None
        self.exit: Callable[[], None] = lambda: None
        self._task: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Called once the loop runs, whose signals were the server's until then."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):  # Windows leaves them to uvicorn
                loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._drain())
        else:
            self._service.worker.abandon()
            self.exit()

    async def _drain(self) -> None:
        assert self.gate is not None, "the server runs"
        self.gate.draining = True
        await self.gate.quiet(self._service.settings.drain_seconds)
        self._service.worker.abandon()
        self.exit()
