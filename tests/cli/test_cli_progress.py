"""Progress: nothing before two seconds, one line on a terminal, whole lines in a log."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import final

import pytest

from consilium.cli.progress import Lines


@final
class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@final
class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device", text)


def clock_of(times: Sequence[float]) -> Callable[[], float]:
    left = iter(times)
    return lambda: next(left)


def shown(stream: io.StringIO, times: Sequence[float]) -> str:
    with Lines("converting", " GB", clock=clock_of(times), stream=stream) as said:
        for done in (10, 20, 30, 40):
            said(done, 40)
    return stream.getvalue()


def test_a_terminal_has_one_line_that_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    text = shown(Terminal(), [0.0, 1.9, 2.1, 2.1, 2.2, 2.7, 2.7])
    assert text == "\rconverting:  50% of 40 GB\rconverting: 100% of 40 GB\n"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "dumb terminal"])
def test_a_log_has_lines_without_carriage_returns(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    text = shown(stream, [0.0, 1.9, 2.1, 2.1, 12.0, 12.2, 12.2])
    assert text == "converting:  50% of 40 GB\nconverting: 100% of 40 GB\n"


def test_what_is_quick_says_nothing() -> None:
    assert shown(Terminal(), [0.0, 0.1, 0.2, 0.3, 0.4]) == ""


def test_a_full_log_ends_progress_and_nothing_else() -> None:
    assert shown(Full(), [0.0, 3.0, 3.0, 20.0, 40.0, 60.0]) == ""
