"""How uvicorn keeps the connections behind which a gate stands."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from consilium.serving.limits import HEADER_SECONDS


@final
class Connection(asyncio.Protocol):
    """One of uvicorn's, closed where the headers of a request are not there in time.

    However often a few bytes arrive: the time runs from the first, or from when the client connected.
    Between requests uvicorn's own ``timeout_keep_alive`` holds.
    """

    def __init__(self, **given: Any) -> None:
        self._inner = H11Protocol(**given)
        self._limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "a stream of bytes"
        self._inner.connection_made(transport)
        self._start(transport)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)
        if self._inner.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._limit is None:
            self._start(self._inner.transport)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def _start(self, transport: asyncio.Transport) -> None:
        self._limit = asyncio.get_running_loop().call_later(HEADER_SECONDS, transport.close)

    def _stop(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None


QUIET: Final[Mapping[str, Any]] = MappingProxyType(
    {"http": Connection, "ws": "none", "log_level": "warning", "access_log": False, "server_header": False}
)
"""Settings of uvicorn: HTTP alone, and nothing of a request is logged."""
