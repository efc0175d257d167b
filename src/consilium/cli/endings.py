"""How a command ends: its exit code, and one sentence where something failed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

from consilium.cli.exits import BROKEN_PIPE, INTERRUPTED, MISTAKE
from consilium.cli.failures import failure_text
from consilium.errors import ConsiliumError, one_line
from consilium.words.say import say


def ended(work: Callable[[], int]) -> int:
    """Run ``work`` and return the exit code: its own, 2 after a user's mistake, 130 after Ctrl-C."""
    try:
        code = work()
        _flush()
    except ConsiliumError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        _tell(say("interrupted"))
        return INTERRUPTED
    except BrokenPipeError:
        _forget_output()  # the reader went away (`| head`)
        return BROKEN_PIPE
    except Exception as error:
        text = failure_text(error)
        if text is None:
            error.add_note(
                say(
                    "This is a fault of Consilium, not yours: please report it with the lines above, the"
                    " command, and what `consilium doctor` prints."
                )
            )
            raise
        return _refuse(f"{text}.")
    return code


def _refuse(text: str) -> int:
    try:
        _flush()
    except OSError:  # full, which may be what `text` says
        _forget_output()
    _tell(say("error: {sentence}", sentence=one_line(text)))
    return MISTAKE


def _tell(text: str) -> None:
    """Print to standard error, or nowhere where it is closed or full: never to standard output."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr)


def _flush() -> None:
    if sys.stdout is not None:  # None where it was closed
        sys.stdout.flush()


def _forget_output() -> None:
    """Python flushes standard output again at exit; let that go nowhere."""
    if sys.stdout is None:
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
