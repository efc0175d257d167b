"""The engine in a thread of its own, between steps of which the event loop's wishes are heard."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from typing import Final, TypeVar, final

import torch

from consilium.engine.engine import Engine
from consilium.engine.request import Piece, Request
from consilium.errors import ConsiliumError
from consilium.serving.body import Failed, Full, Refused

_LOG: Final = logging.getLogger("consilium.serving")
_T = TypeVar("_T")
_Stream = asyncio.Queue[tuple[int, Piece]]
_Wish = Callable[[], None]
_STOPPING: Final = ConsiliumError("the server is stopping")


@final
class Worker:
    """Runs an engine that nobody else touches; everything else of it is for the event loop's thread."""

    def __init__(self, engine: Engine, *, most_waiting: int) -> None:
        self._engine = engine
        self._most = engine.most_rows + most_waiting
        self._wishes: queue.SimpleQueue[_Wish | None] = queue.SimpleQueue()
        self._streams: dict[int, tuple[_Stream, int]] = {}
        self._thread = threading.Thread(target=self._run, name="consilium-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads = 1
        self.active = 0
        """Sequences that wait or run."""

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads = torch.get_num_threads()
        self._thread.start()

    def stop(self) -> None:
        """Forget all requests and wait for the step that runs."""
        self._wishes.put(None)
        self._thread.join()

    def leave(self) -> None:
        """End soon; nobody waits for anything of it."""
        self._wishes.put(None)

    def abandon(self) -> None:
        """Tell everybody who still waits that no more comes."""
        for number, (stream, place) in tuple(self._streams.items()):
            stream.put_nowait((place, Piece(number, -1, "", 0.0, "error", error=_STOPPING)))

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def check_room(self, sequences: int) -> None:
        """Raises Full where so many more would wait too long, ConsiliumError where they never fit."""
        if sequences > self._most:
            raise ConsiliumError(
                f"{sequences} sequences in one request are more than the {self._most} that may run and wait"
                " here; ask for fewer."
            )
        if self.active + sequences > self._most:
            raise Full

    async def pieces(
        self, requests: Sequence[Request], seconds: float
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of several requests as they come, each with the place of its request.

        Who stops listening cancels them all. Raises Full, ConsiliumError for a request that the engine does
        not take, Failed for one that it cannot finish, Refused where nothing can keep the form that was asked
        for, TimeoutError where all take longer than ``seconds``.
        """
        end = time.monotonic() + seconds
        self.check_room(len(requests))
        self.active += len(requests)
        stream: _Stream = asyncio.Queue()
        left = len(requests)
        try:
            await self.ask(lambda: self._submit(requests, stream))
            while left:
                place, piece = await asyncio.wait_for(stream.get(), max(end - time.monotonic(), 0))
                if piece.error is not None:
                    if isinstance(piece.error.__cause__, Refused):
                        raise piece.error.__cause__
                    others = "" if piece.error is _STOPPING else "; other requests go on"
                    raise Failed(f"{piece.error}{others}")
                left -= piece.finished is not None
                yield place, piece
        finally:
            self.active -= len(requests)
            self._wishes.put(lambda: self._forget(stream))

    async def ask(self, wish: Callable[[], _T]) -> _T:
        """What ``wish`` returns or raises, called between two steps."""
        answer: Future[_T] = Future()

        def call() -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(wish())
                except Exception as error:  # noqa: BLE001 - it belongs to who asked
                    answer.set_exception(error)

        self._wishes.put(call)
        return await asyncio.wrap_future(answer)

    def _submit(self, requests: Sequence[Request], stream: _Stream) -> None:
        for place, request in enumerate(requests):
            self._streams[self._engine.submit(request)] = stream, place

    def _forget(self, stream: _Stream) -> None:
        for number in [number for number, (known, _) in self._streams.items() if known is stream]:
            del self._streams[number]
            self._engine.cancel(number)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # what OpenMP was told holds for the thread that told it
        while True:
            wishes = [self._wishes.get()] if not self._engine.busy else []
            with contextlib.suppress(queue.Empty):
                while True:
                    wishes.append(self._wishes.get_nowait())
            for wish in wishes:
                if wish is None:
                    return
                wish()
            if self._engine.busy:
                self._step()

    def _step(self) -> None:
        """One step, whose pieces go to who waits for them."""
        try:
            pieces = self._engine.step()
        except Exception as error:  # noqa: BLE001 - a fault of ours ends what runs, and not the server
            pieces = self._given_up(error)
        for piece in pieces:
            if piece.error is not None and not isinstance(piece.error.__cause__, Refused):
                _LOG.error("a request failed", exc_info=piece.error)
        sent = [(*self._streams[p.request], p) for p in pieces if p.request in self._streams]
        if sent and self._loop is not None:
            self._loop.call_soon_threadsafe(_deliver, sent)

    def _given_up(self, error: Exception) -> list[Piece]:
        """The last pieces of all requests, which the engine forgets."""
        last = ConsiliumError("the engine failed")
        last.__cause__ = error
        for number in self._streams:
            self._engine.cancel(number)
        return [Piece(number, -1, "", 0.0, "error", error=last) for number in self._streams]


def _deliver(pieces: Sequence[tuple[_Stream, int, Piece]]) -> None:
    for stream, place, piece in pieces:
        stream.put_nowait((place, piece))
