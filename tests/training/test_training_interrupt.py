"""A request to stop is answered at once, impatience loses nothing, and a second request is obeyed."""

from __future__ import annotations

import contextlib
import signal
import threading

import pytest

from consilium.training import interrupt
from consilium.training.interrupt import borrowed_signals, polite_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_request_is_answered_and_a_burst_is_one(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with polite_stop() as asked:
        assert not asked()
        for _ in range(5):
            signal.raise_signal(number)
        assert asked()
    assert capfd.readouterr().err.count("stopping: the step in progress ends and is saved") == 1


def test_asking_again_later_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "BURST", -1.0)
    with polite_stop() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_given_back_whatever_happens() -> None:
    before = signal.getsignal(signal.SIGINT)
    with contextlib.suppress(ZeroDivisionError), polite_stop():
        assert signal.getsignal(signal.SIGINT) is not before
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_is_never_asked() -> None:
    answers: list[bool] = []

    def work() -> None:
        with polite_stop() as asked:
            answers.append(asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_the_callers_again_at_the_end(number: signal.Signals) -> None:
    """A program's own handler hears of what stopped the training inside it, once and after it."""
    heard: list[str] = []
    before = signal.signal(number, lambda *_: heard.append("theirs"))
    try:
        with borrowed_signals() as asked:
            signal.raise_signal(number)
            heard.append(f"saved: {asked()}")
        assert heard == ["saved: True", "theirs"]
    finally:
        signal.signal(number, before)


def test_ctrl_c_in_a_program_is_a_keyboard_interrupt_once_all_is_saved() -> None:
    done: list[str] = []

    def work() -> None:
        with borrowed_signals() as asked:
            signal.raise_signal(signal.SIGINT)
            done.append(f"saved: {asked()}")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["saved: True"]


def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup: the terminal may go, the run stays."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with polite_stop() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert not asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_of_several_processes_answers(capfd: pytest.CaptureFixture[str]) -> None:
    with polite_stop(aloud=False) as asked:
        signal.raise_signal(signal.SIGTERM)
        assert asked()
    assert capfd.readouterr().err == ""
