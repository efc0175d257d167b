"""A request to stop is answered at once, impatience loses nothing, and a second request is obeyed."""

from __future__ import annotations

import contextlib
import signal
import threading

import pytest

from consilium.training import interrupt
from consilium.training.interrupt import polite_stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
