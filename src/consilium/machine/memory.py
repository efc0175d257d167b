"""How much memory this process can have, and a clear word before it asks for more."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from consilium.errors import ConsiliumError
from consilium.machine import groups
from consilium.machine.groups import ROOT, read

_ALLOCATION: Final = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Cannot allocate memory|bad allocation",
    re.IGNORECASE,
)
"""How torch words, in a RuntimeError, that an allocation failed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the system, Python or torch, on whatever device, had no memory left."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _ALLOCATION.search(str(error)) is not None
    )


def asked_for(error: BaseException) -> str:
    """`` (2.00 GiB more were asked for)`` where torch says so; it has two ways of saying it."""
    found = re.search(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", str(error), re.IGNORECASE)
    if found is None:
        return ""
    size = f"{int(found[1]) / 2**30:.2f} GiB" if found[2] == "bytes" else f"{found[1]} {found[2]}"
    return f" ({size} more were asked for)"


def physical_memory() -> int:
    """Bytes of memory in this machine, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes that this process can have at most: memory and swap, or the limit of its container or job.

    None where that is not known: other systems than Linux enlarge their swap as they go. What other programs
    use is not taken off: they may end.
    """
    found = [int(text) for path in _limits(root) if (text := read(path).strip()).isdecimal()]
    swap = _swap(root)
    return min([*found, *(() if swap is None else (physical_memory() + swap,))], default=None)


def free_memory(root: Path = ROOT) -> int:
    """Bytes that could be had now without taking any from other programs, 0 where the system does not say."""
    available = _told("MemAvailable", root)
    found = [value for value in (available, memory_limit(root)) if value is not None]
    return min(found, default=physical_memory())


def refuse_beyond_memory(need: int, what: str, remedy: str, *, limit: int | None = None) -> None:
    """Raise ConsiliumError where ``need`` bytes are more than the process can have."""
    limit = memory_limit() if limit is None else limit
    if limit is not None and need > limit:
        raise ConsiliumError(
            f"{what} needs {need / 2**30:,.1f} GiB of memory, and there are {limit / 2**30:,.1f} GiB here;"
            f" {remedy}."
        )


def _limits(root: Path) -> Iterator[Path]:
    """Files with the limit of each group; they hold ``max`` or a huge number where there is none."""
    for folder in groups.folders("memory", root):
        yield folder / "memory.limit_in_bytes"
        yield folder / "memory.max"


def _swap(root: Path) -> int | None:
    return _told("SwapTotal", root)


def _told(name: str, root: Path) -> int | None:
    """Bytes by a line of Linux's /proc/meminfo such as ``SwapTotal:  8388604 kB``; None elsewhere."""
    for line in read(root / "proc/meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
