"""Several processes behind one address, each with a model, a cache and a queue of its own."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Final

_LOG: Final = logging.getLogger("consilium.serving")
_DEATH: Final = 1
"""PR_SET_PDEATHSIG of Linux."""
_PASSED_ON: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def in_workers(count: int, work: Callable[[int], int]) -> int:
    """Run ``work`` in so many forked processes, to be called before there are threads.

    Signals go on to all of them. Where one ends unasked, all end. Returns the highest of their codes; a
    signal that ended one, and an end that nobody asked for, are 1.
    """
    workers = {_forked(work, number) for number in range(count)}
    stopping = False

    def pass_on(number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = stopping or number != signal.SIGUSR1
        _send(workers, number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    worst = 0
    try:
        while workers:
            pid, status = os.wait()
            workers.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            worst = max(worst, 1 if code < 0 or not (code or stopping) else code)
            if not stopping:
                stopping = True
                _LOG.error("a worker ended by itself (%s), and the others end too", _how(code))
                _send(workers, signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return worst


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _forked(work: Callable[[int], int], number: int) -> int:
    parent = os.getpid()
    if pid := os.fork():
        return pid
    code = 1
    try:
        for signalled in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signalled, signal.SIG_DFL)  # until it serves there is nothing to end in order
        os.setpgid(0, 0)  # Ctrl-C is for the parent, which passes it on once
        _end_with(parent)
        code = work(number)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with(parent: int) -> None:
    """Get SIGTERM when the parent is no more, however it ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DEATH, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _send(workers: set[int], number: int) -> None:
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
