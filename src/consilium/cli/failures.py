"""What a failure of the machine means to its user: one sentence, and what to do."""

from __future__ import annotations

import errno
import os
from types import MappingProxyType

from consilium.machine.memory import asked_for, is_out_of_memory

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
    if is_out_of_memory(error):
        return _NO_MEMORY.format(asked=asked_for(error))
    return _system(error) if isinstance(error, OSError) else None


def _system(error: OSError) -> str:
    if error.errno == errno.ENOSPC and error.filename is None:
        return "no space left for standard output or a file that was being written; free some where they go"
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    what = (error.strerror or str(error) or type(error).__name__).lower()
    where = " to ".join(names)
    return f"{where}{': ' if where else ''}{what}; {_REMEDIES.get(error.errno or 0, _ELSEWHERE)}"
