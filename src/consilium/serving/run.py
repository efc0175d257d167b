"""A server from its first to its last moment: its address, its signals, and how it lets go."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, final

import uvicorn

from consilium.errors import ConsiliumError
from consilium.serving.app import build_app
from consilium.serving.connection import QUIET
from consilium.serving.gate import Gate
from consilium.serving.limits import BODY_SECONDS
from consilium.serving.names import OWN_NAMES
from consilium.serving.service import Current, Service

_LAST_SECONDS: Final = 2
RENEWS: Final = getattr(signal, "SIGUSR1", None)
"""What reads the model again; SIGHUP is what a terminal sends that goes. None where signals have no such."""
_LOG: Final = logging.getLogger("consilium.serving")


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


def serve(
    first: Callable[[], Service],
    listener: socket.socket,
    *,
    host: str,
    renewed: Callable[[], Service] | None = None,
) -> None:
    """Answer requests with what ``first`` makes until a signal, then let those that run finish.

    SIGUSR1 reads the model again, by ``renewed``: who is being answered goes on with the one before. Nobody
    but ``Current`` holds a service, so that it goes when nobody asks it any more.
    """
    current = Current(first())
    signals = _Signals(current, renewed)
    app = build_app(current, lambda: not gate.draining, signals.watch)
    gate = Gate(app, current.service.settings.keys, OWN_NAMES | {host.lower()} if is_loopback(host) else None)
    config = uvicorn.Config(
        gate,
        **QUIET,
        lifespan="on",
        timeout_keep_alive=int(BODY_SECONDS),
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    server = uvicorn.Server(config)
    signals.gate, signals.exit = gate, lambda: setattr(server, "should_exit", True)
    server.run(sockets=[listener])


@final
class _Signals:
    """The first to stop refuses what comes and waits for what runs; the second ends that too."""

    def __init__(self, current: Current, renewed: Callable[[], Service] | None) -> None:
        self._current = current
        self._renewed = renewed
        self.gate: Gate | None = None
        self.exit: Callable[[], None] = lambda: None
        self._draining: asyncio.Task[None] | None = None
        self._changing: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Called once the loop runs, whose signals were the server's until then."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError):  # Windows leaves them to uvicorn
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._stop)
            if self._renewed is not None and RENEWS is not None:
                loop.add_signal_handler(RENEWS, self._renew, self._renewed)

    def _stop(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        else:
            self._current.abandon()
            self.exit()

    async def _drain(self) -> None:
        assert self.gate is not None, "the server runs"
        self.gate.draining = True
        await self.gate.quiet(self._current.service.settings.drain_seconds)
        self._current.abandon()
        self.exit()

    def _renew(self, renewed: Callable[[], Service]) -> None:
        if self._draining is not None:
            return
        if self._changing is not None and not self._changing.done():
            _LOG.warning("the model is being read again already")
            return
        self._changing = asyncio.create_task(self._change(renewed))

    async def _change(self, renewed: Callable[[], Service]) -> None:
        """What cannot be read changes nothing."""
        try:
            service = await _apart(renewed)
        except (ConsiliumError, MemoryError) as error:
            _LOG.error("the model stays as it is: %s", error)
            return
        except Exception as error:  # noqa: BLE001 - a fault of ours ends no server
            _LOG.error("the model stays as it is", exc_info=error)
            return
        if self._draining is None:
            self._current.change(service)


def _apart(call: Callable[[], Service]) -> asyncio.Future[Service]:
    """Called in a thread that a server which ends does not wait for."""
    done: Future[Service] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it belongs to who asked
            done.set_exception(error)

    threading.Thread(target=run, name="consilium-reading", daemon=True).start()
    return asyncio.wrap_future(done)
