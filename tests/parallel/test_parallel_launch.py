"""Our own launcher: what becomes of a process that fails."""

from __future__ import annotations

import os
import warnings

import pytest

from consilium.parallel.launch import launch


def test_a_fault_in_one_process_is_shown_and_is_the_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        return 1 // (1 - int(os.environ["RANK"]))

    with warnings.catch_warnings():
        # Other threads of the test process do nothing that a child would wait for.
        warnings.simplefilter("ignore", DeprecationWarning)
        assert launch(2, work) == 1
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_the_exit_code_is_that_of_the_first_process_that_failed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert launch(2, lambda: 3 * int(os.environ["RANK"])) == 3
        assert launch(2, lambda: 0) == 0
