"""One process at a time: the rules by which this program locks a file, or a folder that it fills."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from consilium.disk.files import DISK, Filesystem, make_parents, write_failure
from consilium.errors import ConsiliumError

if sys.platform != "win32":
    import fcntl

_NO_LOCKS: Final = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})


@contextlib.contextmanager
def held(
    file: Path,
    *,
    busy: str,
    notice: Callable[[str], None] = lambda sentence: None,
    wait: float = 0.0,
    files: Filesystem = DISK,
) -> Iterator[bool]:
    """Keep every other process that asks for ``file`` out meanwhile, and yield whether that is so.

    The file stays behind; the system forgets who held it when a process ends, however it ends. The same
    thread may take it again inside. Raises ConsiliumError with the sentence ``busy`` where another process
    holds it for longer than ``wait`` seconds, and where the file cannot be made. A file system that has no
    locks is told to ``notice``.
    """
    lock = FileLock(file.absolute(), timeout=wait, fallback_to_soft=False, is_singleton=True)
    alone = True
    try:
        make_parents(file.parent, files)
        lock.acquire(timeout=wait)
    except Timeout:
        if not os.access(file, os.W_OK):  # never made, or not ours: nobody needs to hold it
            raise write_failure(PermissionError(errno.EACCES, "no permission"), file.parent) from None
        raise ConsiliumError(busy) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise write_failure(error, file.parent) from None
        notice(f"the file system of {file.parent} has no locks: let no other process write there")
        alone = False
    try:
        yield alone
    finally:
        lock.release()


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Let every process see by ``is_filled`` that this one is at ``folder``, until it ends, however it ends.

    No file stays behind. Without effect where the system or the file system locks no folders.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_filled(folder: Path) -> bool:
    """Whether somebody is at ``folder`` now."""
    if sys.platform == "win32":
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
