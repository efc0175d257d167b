"""The page without a model, on this machine alone: training runs as they go on, and plans."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from pathlib import Path

import uvicorn

from consilium.serving.connection import QUIET
from consilium.serving.gate import Gate
from consilium.serving.names import LOOPBACK, OWN_NAMES
from consilium.serving.pages import Shown, page_app


def own_listener() -> socket.socket:
    """A port of this machine that is free, which no other machine reaches."""
    return socket.create_server((LOOPBACK, 0), backlog=128)


def address(listener: socket.socket) -> str:
    return f"http://{LOOPBACK}:{listener.getsockname()[1]}/"


def serve_page(listener: socket.socket, runs: Path, *, until_closed: bool) -> None:
    """Answer until a signal, or, with ``until_closed``, until nobody holds the other end of the input."""
    gate = Gate(page_app(Shown(runs=runs)), (), OWN_NAMES)
    server = uvicorn.Server(uvicorn.Config(gate, **QUIET, lifespan="off"))
    if until_closed:
        threading.Thread(target=_end_with_input, args=(server,), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises again what ended it
        server.run(sockets=[listener])


def _end_with_input(server: uvicorn.Server) -> None:
    """Whoever started this process may be killed; then the system closes its end."""
    while sys.stdin.buffer.read(4096):
        pass
    server.should_exit = True
