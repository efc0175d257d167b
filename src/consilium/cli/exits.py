"""How the command ends: exit codes (0 is success, 1 a check that failed), and a stop that was asked for."""

from __future__ import annotations

import signal
from typing import Final

MISTAKE: Final = 2
"""The user's, told in one sentence."""
INTERRUPTED: Final = 130
"""Stopped by Ctrl-C or SIGTERM, saved or not."""
BROKEN_PIPE: Final = 141
"""The reader of standard output went away."""


def tell_stopped(text: str) -> int:
    """Say how to go on and return the exit code. More Ctrl-C, in impatience, must not cut the answer off."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(text)
    return INTERRUPTED
