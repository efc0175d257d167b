"""Whether another process of this machine still runs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from consilium.machine.groups import ROOT, read


def identity() -> str:
    """This process as others may look for it."""
    return f"{os.getpid()}@{socket.gethostname()}"


def is_gone(identity: str, root: Path = ROOT) -> bool:
    """Whether the process of that identity has ended or was stopped; False where that is not known here."""
    pid, _, host = identity.partition("@")
    if host != socket.gethostname() or not (root / "proc/self/stat").exists():
        return False
    # The name of a program, in parentheses, may hold anything; the state is the letter behind it.
    state = read(root / "proc" / pid / "stat").rpartition(")")[2].split()[:1]
    return state == [] or state[0] in "ZXTt"
