"""What a failure of the machine means to its user: one sentence, and what to do."""

from __future__ import annotations

import errno
import os
import re
from types import MappingProxyType

_ALLOCATION = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Cannot allocate memory|bad allocation",
    re.IGNORECASE,
)
"""How torch words, in a RuntimeError, that an allocation failed."""
_NO_MEMORY = (
    "out of memory{asked}: close other programs, or choose a smaller --batch, --seq or --max-tokens, another"
    " --dtype or a smaller model"
)
_REMEDIES = MappingProxyType(
    {
        errno.ENOENT: "check the path",
        errno.ENOTDIR: "check the path",
        errno.EISDIR: "give the name of a file",
        errno.EEXIST: "choose another name, or move what is there",
        errno.ENOSPC: "free some, or choose a place on another disk",
        errno.EDQUOT: "free some of your quota, or choose another place",
        errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose another place",
        errno.EROFS: "choose a place that can be written to",
        errno.EACCES: "choose another place, or change its permissions",
        errno.EPERM: "choose another place, or change its permissions",
        errno.EMFILE: "close some, or raise the limit (ulimit -n)",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.EIO: "check the disk or the network behind it",
        errno.ESTALE: "check the network behind it",
    }
)
_ELSEWHERE = "check the disk, the network and the limits of this machine, then try again"


def failure_text(error: BaseException) -> str | None:
    """The sentence for a failure of disk, memory or system; None for a fault of ours."""
    if isinstance(error, OSError) and error.errno != errno.ENOMEM:
        return _system(error)
    if isinstance(error, OSError | MemoryError):
        return _NO_MEMORY.format(asked="")
    if isinstance(error, RuntimeError) and _ALLOCATION.search(str(error)):
        return _NO_MEMORY.format(asked=_asked(str(error)))
    return None


def _system(error: OSError) -> str:
    if error.errno == errno.ENOSPC and error.filename is None:
        return "no space left for standard output or a file that was being written; free some where they go"
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    what = (error.strerror or str(error) or type(error).__name__).lower()
    where = " to ".join(names)
    return f"{where}{': ' if where else ''}{what}; {_REMEDIES.get(error.errno or 0, _ELSEWHERE)}"


def _asked(text: str) -> str:
    """``tried to allocate 80000000000 bytes`` and ``Tried to allocate 20.00 GiB`` of torch."""
    found = re.search(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)", text, re.IGNORECASE)
    if found is None:
        return ""
    size = f"{int(found[1]) / 2**30:.2f} GiB" if found[2] == "bytes" else f"{found[1]} {found[2]}"
    return f" ({size} more were asked for)"
