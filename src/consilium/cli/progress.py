"""What is told on the way: notes, and from two seconds on progress, both on standard error.

Progress is one line that is written again, or lines in a log.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TextIO, final

from consilium.words.say import say
from consilium.words.seldom import LOG_SECONDS, QUIET_SECONDS

_TERMINAL_SECONDS = 0.5


def note(text: str) -> None:
    """Say something beside what was asked for."""
    print(text, file=sys.stderr, flush=True)


def teller(*, json: bool) -> Callable[[str], None]:
    """What shows a run: on standard output, unless that is for one JSON object alone."""
    return note if json else print


@final
class Lines:
    """Call it with what is done and what there is to do. Use it as a context manager, so that a line ends."""

    def __init__(
        self,
        verb: str,
        unit: str = "",
        *,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ) -> None:
        self._verb, self._unit, self._clock = verb, unit, clock
        self._stream = sys.stderr if stream is None else stream
        self._next = clock() + QUIET_SECONDS
        self._open = False

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._write("\n")

    def __call__(self, done: float, total: float) -> None:
        if self._stream is None or self._clock() < self._next:
            return
        live = _rewrites(self._stream)
        self._next = self._clock() + (_TERMINAL_SECONDS if live else LOG_SECONDS)
        text = self._verb
        if total:
            text = say(
                "{does}: {share:4.0%} of {total:,.3g}{unit}",
                does=self._verb,
                share=done / total,
                total=total,
                unit=self._unit,
            )
        self._write(f"\r{text}" if live else f"{text}\n")
        self._open = live

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:  # nobody reads it, and what is done does not depend on it
            self._next = float("inf")


def _rewrites(stream: TextIO) -> bool:
    """Whether a line can be written again: a file and a dumb terminal keep every one."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"
