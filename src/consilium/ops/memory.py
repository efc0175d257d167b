"""How much memory this process can have, and a clear word before it asks for more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from consilium.errors import ConsiliumError

ROOT: Final = Path("/")
_LIMITS: Final = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")
"""The limit of a container, in control groups of version 2 and 1; ``max`` or a huge number is none."""


def physical_memory() -> int:
    """Bytes of memory in this machine, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes that this process can have at most: memory and swap, or its container's limit.

    None where the system does not say. What other programs use is not taken off: they may end.
    """
    physical = physical_memory()
    known = [physical + _swap(root)] if physical else []
    for name in _LIMITS:
        text = _read(root / name).strip()
        known += [int(text)] if text.isdecimal() else []
    return min(known, default=None)


def refuse_beyond_memory(need: int, what: str, remedy: str, *, limit: int | None = None) -> None:
    """Raise ConsiliumError where ``need`` bytes are more than the process can have."""
    limit = memory_limit() if limit is None else limit
    if limit is not None and need > limit:
        raise ConsiliumError(
            f"{what} needs {need / 2**30:,.1f} GiB of memory, and this machine has {limit / 2**30:,.1f} GiB,"
            f" swap included; {remedy}."
        )


def _swap(root: Path) -> int:
    """``SwapTotal:  8388604 kB`` of Linux's /proc/meminfo; elsewhere swap has no fixed size."""
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("SwapTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
