"""How the command ends: exit codes (0 is success, 1 a check that failed), and how to say what goes on."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

MISTAKE: Final = 2
"""The user's, told in one sentence."""
INTERRUPTED: Final = 130
"""Stopped by Ctrl-C, SIGTERM or SIGHUP, saved or not."""
BROKEN_PIPE: Final = 141
"""The reader of standard output went away."""
NAME: Final = "consilium"


def command_line(*words: object) -> str:
    """This command with ``words``, as the shell that called it reads them."""
    texts = [*_program(), *map(str, words)]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def _program() -> list[str]:
    """The name alone where it finds this command, else the way it was called: a path, or ``python -m``."""
    called, found = Path(sys.argv[0]), shutil.which(NAME)
    if found is not None and Path(found).resolve().parent == Path(sys.executable).absolute().parent.resolve():
        return [NAME]
    return [str(called)] if called.stem == NAME else [sys.executable, "-m", NAME]
