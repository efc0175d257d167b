"""What every request passes before the application sees it: keys, sizes, and whether the server is leaving.

An ASGI layer, outside of all routes: a path that somebody adds is closed until a key opens it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, Final, final

from consilium.serving.body import Refused
from consilium.serving.limits import BODY, BODY_SECONDS, HEADER_BYTES, HEADERS

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_SCRIPTS: Final = (
    "api",
    "chat",
    "chips",
    "compare",
    "dom",
    "domains",
    "heat",
    "page",
    "plan",
    "token",
    "train",
)
PAGE: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "/": ("index.html", "text/html"),
        "/icon.svg": ("icon.svg", "image/svg+xml"),
        "/page.css": ("page.css", "text/css"),
        "/report.css": ("../../report/templates/report.css", "text/css"),
        **{f"/{name}.js": (f"{name}.js", "text/javascript") for name in _SCRIPTS},
    }
)
"""Paths of the page: its files, which are the same for everybody, and their kinds."""
OPEN: Final = frozenset({"/health", *PAGE})
"""Paths that need no key: whether the process lives is no secret, and the page asks for one itself."""
SALT: Final = "consilium.salt"
"""Where a request's scope says whose it is: what is computed for a prompt is shared within a key alone."""
_JSON: Final = b"application/json"


def error_object(refused: Refused) -> dict[str, Any]:
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    told = {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}
    return {"error": told}


@final
class Gate:
    """Wraps an application. ``draining`` refuses what comes; ``busy`` counts what is being answered."""

    def __init__(self, app: App, keys: tuple[str, ...], hosts: frozenset[str] | None) -> None:
        """``hosts`` are the names by which the server may be addressed; None for any."""
        self._app = app
        self._keys = tuple(_digest(key.encode()) for key in keys)
        self._hosts = hosts
        self._salt = secrets.token_bytes(16)
        self.draining = False
        self.busy = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self.busy += 1
        self._idle.clear()
        identified = _with_id(send)
        try:
            self._check(scope)
            body = await _body(scope, receive) if scope["method"] in {"POST", "PUT", "PATCH"} else b""
            await self._app(scope, _replayed(body, receive), identified)
        except Refused as refused:
            await respond(refused, identified)
        finally:
            self.busy -= 1
            if not self.busy:
                self._idle.set()

    async def quiet(self, seconds: float) -> None:
        """Wait until nothing is being answered, or so long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)

    def _check(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > HEADERS or sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES:
            raise Refused(431, f"the headers are more than {HEADERS} or {HEADER_BYTES:,} bytes")
        found = {name.lower(): value for name, value in headers}
        host = found.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0].lower()
        if self._hosts is not None and host not in self._hosts:
            raise Refused(421, "the Host header names another server; address this one by its own name")
        key = _digest(found.get(b"authorization", b"").partition(b" ")[2].strip())
        scope[SALT] = hashlib.sha256(self._salt + key).digest()
        if self._keys and scope["path"] not in OPEN and not self._opens(key):
            raise Refused(401, "this needs a key: Authorization: Bearer KEY", code="invalid_api_key")
        if scope["method"] == "POST":
            if self.draining:
                raise Refused(503, "the server is stopping; ask again in a while", code="stopping")
            if found.get(b"content-type", b"").split(b";")[0].strip().lower() != _JSON:
                raise Refused(415, "the body has to be JSON: Content-Type: application/json")

    def _opens(self, key: bytes) -> bool:
        """Compares with all keys, in the same time whichever fits."""
        fitting = [hmac.compare_digest(key, known) for known in self._keys]
        return any(fitting)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _body(scope: Scope, receive: Receive) -> bytes:
    """All of it, once it is known not to be too much."""
    told = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"0")
    if not told.isdigit() or int(told[:20]) > BODY:
        raise _too_large()
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "the client left in the middle of the body")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > BODY:
                    raise _too_large()
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise Refused(408, f"the body took longer than {BODY_SECONDS:.0f} seconds") from None


def _too_large() -> Refused:
    return Refused(413, f"the body has more than {BODY:,} bytes")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body once, and then what the connection says."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _with_id(send: Send) -> Send:
    """A ``send`` that names each answer, so that a log and a client can speak of the same one."""
    name = secrets.token_hex(8).encode()

    async def named(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), (b"x-request-id", name)]
        await send(message)

    return named


async def respond(refused: Refused, send: Send) -> None:
    """An error of HTTP as OpenAI's clients read it."""
    body = json.dumps(error_object(refused)).encode()
    headers = [(b"content-type", _JSON), (b"content-length", str(len(body)).encode())]
    if refused.status in {429, 503}:
        headers.append((b"retry-after", b"1"))
    if refused.status in {408, 413}:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
