"""What holds for every test: one thread, a cache of its own, and memory that is never zero by luck."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from consilium.machine.processors import usable

THREADS = 1
SHOWN_FROM_SECONDS = 60
os.environ["OMP_NUM_THREADS"] = str(THREADS)
os.environ["MKL_NUM_THREADS"] = str(THREADS)
os.environ["NO_COLOR"] = "1"
os.environ["CONSILIUM_LANG"] = "en"
# Tests of the native kernels compile them once (tests/kernels.py); others would, in each cache of their own.
os.environ["CONSILIUM_NATIVE"] = "off"

# A shell lets what it starts in the background ignore some; the commands under test would ignore them too.
for known in signal.Signals:
    if known.name in {"SIGINT", "SIGTERM", "SIGHUP"} and signal.getsignal(known) is signal.SIG_IGN:
        signal.signal(known, signal.default_int_handler if known.name == "SIGINT" else signal.SIG_DFL)

# The same examples on every machine: a failure seen once is a failure that can be repeated.
settings.register_profile("consilium", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("consilium")


def pytest_xdist_auto_num_workers() -> int:
    """``-n auto`` is a worker a core that this process can have, in a container with a quota too."""
    return usable()


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONSILIUM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _poison() -> Iterator[None]:
    """Fill uninitialised floating-point memory with NaN, where a collected test has imported torch."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    torch.set_num_threads(THREADS)
    # A device context remembers torch's factory functions at its first use; let it see the real ones.
    with torch.device("cpu"):
        torch.empty(0)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, _poisoned(torch, getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, _poisoned(torch, getattr(torch.Tensor, name)))
        yield


def _poisoned(torch: Any, allocate: Any) -> Any:
    def poisoned(*args: Any, **options: Any) -> Any:
        result = allocate(*args, **options)
        if result.is_floating_point():
            with torch.no_grad():
                result.fill_(float("nan"))
        return result

    return poisoned


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the seconds of each folder, slowest first: what a budget of minutes is spent on."""
    spent = Counter[str]()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                spent[Path(report.location[0]).parent.name] += report.duration
    if sum(spent.values()) > SHOWN_FROM_SECONDS:
        line = ", ".join(f"{folder} {seconds:.0f} s" for folder, seconds in spent.most_common())
        terminalreporter.write_line(f"seconds by folder: {line}")
