"""Several processes on this machine, forked from one that has imported torch and computed nothing yet."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Final

from consilium.errors import ConsiliumError
from consilium.machine.processors import usable
from consilium.parallel.environment import STORE

GRACE: Final = 10.0
"""Seconds that the others have once one has failed: they notice by themselves, or hang in it."""


def launch(processes: int, work: Callable[[], int]) -> int:
    """Run ``work`` in so many processes and return the exit code of the first that failed, or 0.

    Signals that ask for a stop go on to all of them. What is left when one has failed is ended.
    """
    if os.name != "posix":
        raise ConsiliumError(
            "--nproc needs an operating system that can fork; start it with torchrun instead."
        )
    with tempfile.TemporaryDirectory(prefix="consilium-") as folder:
        children = [_forked(rank, processes, Path(folder) / "store", work) for rank in range(processes)]
        with _forwarded(children):
            return _first_failure(_ended(children))


def _forked(rank: int, processes: int, store: Path, work: Callable[[], int]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            STORE: str(store),
        }
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable() // processes)))
        code = work()
    except BaseException:  # noqa: BLE001 - a fault: nobody above tells it, as this process ends here
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _ended(children: list[int]) -> dict[int, int]:
    """Exit codes by child, in the order in which they ended; negative ones are signals."""
    codes: dict[int, int] = {}
    failed: float | None = None
    while len(codes) < len(children):
        for child in [c for c in children if c not in codes]:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
                failed = time.monotonic() if codes[child] and failed is None else failed
            elif failed is not None and time.monotonic() - failed > GRACE:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return codes


def _first_failure(codes: dict[int, int]) -> int:
    failures = [code for code in codes.values() if code]
    first = failures[0] if failures else 0
    return first if first >= 0 else 128 - first


@contextlib.contextmanager
def _forwarded(children: list[int]) -> Iterator[None]:
    """Pass on what asks this process to stop; a terminal has told the children already, which is as well."""

    def forward(number: int, _frame: FrameType | None) -> None:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, forward) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
