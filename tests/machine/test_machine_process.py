"""Whether a process still runs: one that runs, is stopped, is dead and not yet collected, and is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from consilium.machine.process import identity, is_gone


def until(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def test_a_process_is_gone_when_it_is_stopped_dead_or_collected() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    name = identity().replace(str(os.getpid()), str(child.pid))
    assert not is_gone(name)
    child.send_signal(signal.SIGSTOP)
    assert until(lambda: is_gone(name))
    child.send_signal(signal.SIGKILL)
    assert until(lambda: is_gone(name))
    child.wait()
    assert is_gone(name)
    assert not is_gone(identity())


def test_a_process_of_another_machine_is_not_said_to_be_gone() -> None:
    assert not is_gone("1@a-machine-that-is-not-this-one")
