"""How the command ends: exit codes (0 is success, 1 a check that failed), and how to say what goes on."""

from __future__ import annotations

import os
import shlex
import subprocess
from typing import Final

MISTAKE: Final = 2
"""The user's, told in one sentence."""
INTERRUPTED: Final = 130
"""Stopped by Ctrl-C or SIGTERM, saved or not."""
BROKEN_PIPE: Final = 141
"""The reader of standard output went away."""


def command_line(*words: object) -> str:
    """``words`` as the shell of this system reads them."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)
