"""Checkpoints written at once or behind the steps, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final

from consilium.config.training import Saving

Write = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Written:
    step: int
    folder: Path


class Worker(Protocol):
    def submit(self, write: Write, /) -> Future[None]: ...

    def shutdown(self) -> None:
        """Wait for what was begun, however it ends."""
        ...


@final
class AtOnce:
    """Done when ``submit`` returns."""

    def submit(self, write: Write, /) -> Future[None]:
        future = Future[None]()
        try:
            future.set_result(write())
        except Exception as error:  # noqa: BLE001 - who asks for the result gets it
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        return


@final
class Saver:
    """Writes what must not change any more. A failure is raised by who asks what was written."""

    def __init__(self, saving: Saving) -> None:
        self._worker: Worker = AtOnce() if saving == "blocking" else ThreadPoolExecutor(1, "save")
        self._pending: tuple[Written, Future[None]] | None = None

    def begin(self, what: Written, write: Write) -> None:
        assert self._pending is None, "one at a time"
        self._pending = what, self._worker.submit(write)

    def finished(self, *, wait: bool) -> Written | None:
        """What is written since the last call; ``wait`` for it. Raises what its write raised."""
        if self._pending is None or not (wait or self._pending[1].done()):
            return None
        (what, future), self._pending = self._pending, None
        future.result()
        return what

    def close(self) -> None:
        """Wait without a word: nobody else may work in the folder before."""
        self._worker.shutdown()
