from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from consilium.machine.confined import Confined

posix = pytest.mark.skipif(sys.platform == "win32", reason="limits of the system are POSIX's")


@pytest.fixture
def confined(monkeypatch: pytest.MonkeyPatch) -> Iterator[Confined]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    made = Confined("confined_work")
    yield made
    made.close()


def test_an_answer_is_that_of_the_work(confined: Confined) -> None:
    for request in ({"a": [1, "ü\n\ud800"]}, None, "x" * 300_000):
        assert confined.ask(request, seconds=5) == request
    assert confined.ask("print", seconds=5) == "print"


def test_an_error_is_told_and_the_next_request_answered(confined: Confined) -> None:
    with pytest.raises(RuntimeError, match="it failed"):
        confined.ask("fail", seconds=5)
    assert confined.ask(1, seconds=5) == 1


@posix
def test_what_takes_too_long_is_ended(confined: Confined) -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        confined.ask("burn", seconds=0.2)
    assert time.monotonic() - begun < 5
    with pytest.raises(RuntimeError):
        confined.ask(1, seconds=5)


@posix
def test_waiting_is_no_work_but_ends_too(confined: Confined) -> None:
    assert confined.ask(["sleep", 0.4], seconds=0.2) == ["sleep", 0.4]
    with pytest.raises(TimeoutError):
        confined.ask(["sleep", 60], seconds=0.02)


@posix
def test_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with pytest.raises(RuntimeError):
        Confined("confined_work", memory=2**30).ask("hoard", seconds=5)


def test_a_process_that_ends_is_no_answer(confined: Confined) -> None:
    with pytest.raises(RuntimeError, match="ended"):
        confined.ask("end", seconds=5)


@posix
def test_ctrl_c_while_waiting_leaves_no_answer_behind(confined: Confined) -> None:
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        confined.ask(["sleep", 20], seconds=20)
    with pytest.raises(RuntimeError):
        confined.ask(1, seconds=5)


def test_modules_of_the_current_folder_are_not_imported(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    code = "from consilium.machine.confined import Confined; Confined('confined_work').ask(1, seconds=5)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
