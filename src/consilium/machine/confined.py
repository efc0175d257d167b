"""Work that a foreign file asks for, in a process of its own that ends where it takes too long.

The process is started with this interpreter and this import path, never forked, so that it inherits neither
threads nor locks. One request and one reply are a line of JSON each. On POSIX the limit is CPU time, which a
busy machine does not use up; elsewhere it is wall time.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol, cast, final

if sys.platform != "win32":
    import resource

_START: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from consilium.machine.confined import serve; serve(sys.argv[2], int(sys.argv[3]))"
)
_WALL: Final = 20.0 if sys.platform != "win32" else 1.0
"""Wall seconds for each second of the limit: what a machine may be busy with other things."""
_OUT_OF_TIME: Final = -signal.SIGPROF if sys.platform != "win32" else None
MEMORY: Final = 4 * 2**30


class Work(Protocol):
    """What a module offers as ``start()``: it answers requests, all of them values of JSON."""

    def answer(self, request: Any) -> Any: ...


class WorkModule(Protocol):
    def start(self) -> Work: ...


@final
class Confined:
    """Runs the ``Work`` of a module. Not shared between processes; threads take turns."""

    def __init__(self, module: str, *, memory: int = MEMORY) -> None:
        """``memory`` is the most bytes that the process may have, where the system can limit them."""
        path = [*filter(None, sys.path), str(Path(__file__).parents[2])]
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, and code of ours
            [sys.executable, "-P", "-c", _START, json.dumps(path), module, str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C is for the one who waits, not for the one who works.
            start_new_session=True,
            env=os.environ | {"RAYON_NUM_THREADS": "4"},
        )
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, _end, self._process)

    def ask(self, request: object, *, seconds: float) -> Any:
        """Return the answer to ``request``.

        Raises TimeoutError where it takes more than ``seconds``, after which the process is gone, and
        RuntimeError with what went wrong there.
        """
        with self._lock:
            if self._process.poll() is not None:
                raise RuntimeError("its process ended before")
            reply = self._exchange(json.dumps([seconds, request]).encode() + b"\n", seconds)
        answer = json.loads(reply)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        self._end()

    def _exchange(self, line: bytes, seconds: float) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Event()
        timer = threading.Timer(seconds * _WALL, self._stop, (late,))
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(OSError, ValueError):  # the process, or what was its pipe, is gone
                self._process.stdin.write(line)
                self._process.stdin.flush()
                return self._process.stdout.readline() or self._refuse(late)
            return self._refuse(late)
        except BaseException:
            self.close()  # a late answer must not be taken for that of another request
            raise
        finally:
            timer.cancel()

    def _stop(self, late: threading.Event) -> None:
        late.set()
        self._process.kill()

    def _refuse(self, late: threading.Event) -> NoReturn:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        if late.is_set() or self._process.returncode == _OUT_OF_TIME:
            raise TimeoutError("its time was over")
        raise RuntimeError("its process ended")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def serve(module: str, memory: int) -> None:
    """Answer requests from standard input until it ends; the other side of ``Confined``."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _limit_memory(memory)
    work = cast(WorkModule, importlib.import_module(module)).start()
    for line in sys.stdin.buffer:
        seconds, request = json.loads(line)
        _limit_time(seconds)
        replies.write(json.dumps(_reply(work, request)).encode() + b"\n")
        replies.flush()
        _limit_time(0)


def _reply(work: Work, request: object) -> dict[str, object]:
    try:
        return {"result": work.answer(request)}
    except BaseException as error:  # noqa: BLE001 - a panic of Rust is no Exception
        return {"error": str(error)}


def _limit_time(seconds: float) -> None:
    if sys.platform != "win32":
        # The signal ends the process whatever code runs, compiled code included.
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory(size: int) -> None:
    if sys.platform != "win32":
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
