"""Ctrl-C, SIGTERM and SIGHUP as a polite request: the step in progress ends and the run saves."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Final, final

BURST: Final = 2.0
"""Seconds in which more of the same is impatience, not a second decision: it must not lose the run."""
_ANSWER: Final = (
    b"\nstopping: the step in progress ends and is saved; Ctrl-C again, two seconds on, stops at once\n"
)


@final
class Request:
    """Whether a stop was asked for, and by which signal; asking again after ``BURST`` stops at once."""

    def __init__(self, *, aloud: bool) -> None:
        self.number: int | None = None
        self._asked_at = 0.0
        self._shown = _standard_error() if aloud else None

    def __call__(self) -> bool:
        return self.number is not None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is not None and now - self._asked_at > BURST:
            raise KeyboardInterrupt
        if self.number is None:
            self.number, self._asked_at = number, now
            # Not print: the signal may have come in the middle of one, or the terminal may have gone.
            with contextlib.suppress(OSError):
                if self._shown is not None:
                    os.write(self._shown, _ANSWER)


@contextlib.contextmanager
def polite_stop(*, aloud: bool = True) -> Iterator[Request]:
    """Yield a function that says whether a stop was asked for.

    The first request is answered on standard error where it is ``aloud``, as one of several
    processes is. A signal that is ignored stays so: ``nohup`` means it.
    Outside the main thread signals cannot be caught and the function always answers no.
    """
    request = Request(aloud=aloud)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if os.name == "posix" else [])]
    before = {
        number: signal.signal(number, request.handle)
        for number in numbers
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def borrowed_signals() -> Iterator[Request]:
    """``polite_stop`` inside somebody's program: the signal that stopped it is theirs again at the end."""
    request: Request | None = None
    try:
        with polite_stop() as request:
            yield request
    finally:
        if request is not None and request.number is not None:
            signal.raise_signal(request.number)


def _standard_error() -> int | None:
    """Its descriptor; None where it was closed, since another file may have taken the number 2."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return None
