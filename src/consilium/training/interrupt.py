"""Ctrl-C and SIGTERM as a polite request: the step in progress ends, the run saves and says how to go on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

BURST: Final = 2.0
"""Seconds in which more of the same is impatience, not a second decision: it must not lose the run."""
_ANSWER: Final = (
    b"\nstopping: the step in progress ends and is saved; Ctrl-C again, two seconds on, stops at once\n"
)


@contextlib.contextmanager
def polite_stop() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether a stop was asked for; asking again after ``BURST`` stops at once.

    The first request is answered on standard error. Outside the main thread signals cannot be caught and the
    function always answers no.
    """
    first: list[float] = []
    shown = _standard_error()

    def handle(_number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if first and now - first[0] > BURST:
            raise KeyboardInterrupt
        if not first:
            first.append(now)
            # Not print: the signal may have come in the middle of one.
            with contextlib.suppress(OSError):
                if shown is not None:
                    os.write(shown, _ANSWER)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(first)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _standard_error() -> int | None:
    """Its descriptor; None where it was closed, since another file may have taken the number 2."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return None
