"""A pytest plugin that says of each test whether it called the package, in this process or in another.

The property ``touched`` is ``no`` for a test of an oracle, of a generator or of a fixture alone. A test that
only reads what a fixture of its module made before counts as one that did not: N is rather too low.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import final

import pytest

import consilium

PACKAGE = str(Path(consilium.__file__).parent)
STARTS = frozenset({"subprocess.Popen", "os.posix_spawn", "os.fork"})


@final
class Watch:
    """Watches calls until the first one into the package; another process counts as one."""

    def __init__(self) -> None:
        self.touched = True

    def begin(self) -> None:
        self.touched = False
        threading.setprofile(self._called)
        sys.setprofile(self._called)

    def end(self) -> None:
        threading.setprofile(None)
        sys.setprofile(None)

    def audited(self, event: str, _: object) -> None:
        if event in STARTS:
            self.touched = True

    def _called(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.touched = True
            sys.setprofile(None)


WATCH = Watch()
sys.addaudithook(WATCH.audited)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    WATCH.begin()
    try:
        return (yield)
    finally:
        WATCH.end()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Properties travel with the report of each phase; teardown's is the last that is read."""
    item.user_properties.append(("touched", "yes" if WATCH.touched else "no"))
    return (yield)
