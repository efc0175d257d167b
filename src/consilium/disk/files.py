"""The file operations whose order makes a write crash-safe, behind a protocol that tests can stop."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Protocol, final

from consilium.errors import ConsiliumError

if sys.platform == "darwin":
    import fcntl

Chunk = bytes | memoryview


class Filesystem(Protocol):
    """Everything that changes the disk. Reading needs no protocol: it cannot lose anything."""

    def make_folder(self, path: Path) -> None: ...

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        """Create ``path``; it must not exist."""
        ...

    def append(self, path: Path, chunk: Chunk) -> None:
        """Add all of ``chunk`` to ``path`` with one write, or nothing."""
        ...

    def truncate(self, path: Path, size: int) -> None: ...

    def sync_file(self, path: Path) -> None: ...

    def sync_folder(self, path: Path) -> None:
        """Make the names inside ``path`` durable."""
        ...

    def rename(self, source: Path, target: Path) -> None:
        """Give ``source`` another name; a file takes the place of one there."""
        ...

    def unlink(self, path: Path) -> None: ...

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        ...


@final
class Disk:
    """The real one."""

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        with path.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)

    def append(self, path: Path, chunk: Chunk) -> None:
        with path.open("ab", buffering=0) as file:
            before = file.tell()
            if file.write(chunk) != len(chunk):
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def truncate(self, path: Path, size: int) -> None:
        os.truncate(path, size)

    def sync_file(self, path: Path) -> None:
        _sync(path, os.O_RDWR)

    def sync_folder(self, path: Path) -> None:
        if os.name == "posix":
            _sync(path, os.O_RDONLY)

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        path.rmdir()


DISK: Final = Disk()


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        _flush(descriptor)
    finally:
        os.close(descriptor)


def _flush(descriptor: int) -> None:
    """fsync(2), which on macOS stops at the drive's cache; its F_FULLFSYNC goes through where it is known."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def cache_folder() -> Path:
    """Return CONSILIUM_CACHE, else ``consilium`` under XDG_CACHE_HOME or ``~/.cache``.

    A user without a home, as a container has whose user is a bare number, has a temporary one. Raises
    ConsiliumError where that is somebody else's.
    """
    if chosen := os.environ.get("CONSILIUM_CACHE"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "consilium"
    try:
        return Path.home() / ".cache" / "consilium"
    except RuntimeError:
        return _temporary_cache()


def _temporary_cache() -> Path:
    """A folder that nobody else can write: what lies there is loaded and trained on."""
    folder = Path(tempfile.gettempdir()) / f"consilium-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConsiliumError(
            f"this user has no home and {folder} belongs to others; set CONSILIUM_CACHE to a folder."
        )
    return folder


def make_parents(folder: Path, files: Filesystem) -> None:
    """Create ``folder`` and what is missing above it, each name durable in its parent."""
    if not folder.exists():
        make_parents(folder.parent, files)
        with contextlib.suppress(FileExistsError):  # another process was faster
            files.make_folder(folder)
        files.sync_folder(folder.parent)


def remove_tree(path: Path, files: Filesystem) -> None:
    """Remove ``path``, a file or a folder with everything in it; links are removed, never followed."""
    if path.is_symlink() or not path.is_dir():
        files.unlink(path)
        return
    for inner in sorted(path.iterdir()):
        remove_tree(inner, files)
    files.remove_folder(path)


def refuse_full(place: Path, needed: int, what: str) -> None:
    """Raise ConsiliumError where the disk of ``place`` has less than ``needed`` bytes left for ``what``."""
    free = _free(place)
    if free is not None and free < needed:
        raise ConsiliumError(
            f"no space left on the disk for {what} in {place}: it takes {_bytes(needed)} and"
            f" {_bytes(free)} are free; free some space or choose another folder."
        )


def write_failure(error: OSError, destination: Path) -> ConsiliumError:
    """Say in one sentence why ``destination`` was not written and what to do."""
    start = f"cannot save to {destination}: "
    free = _free(destination)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            left = "" if free is None else f" ({_bytes(free)} free)"
            why = f"no space left on the disk{left}; free some space or choose another folder"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            why = "no permission to write there; choose another folder or change its permissions"
        case errno.EIO:
            why = "the disk reported an input/output error; check the disk or choose another folder"
        case errno.EFBIG:
            why = "a file there must not grow that large; choose another folder"
        case errno.ENOENT:
            why = "no such place, or it vanished meanwhile; choose another folder"
        case _:
            why = f"{(error.strerror or str(error)).lower()}; choose another folder"
    return ConsiliumError(f"{start}{why}; what was saved before is unchanged.")


def _free(place: Path) -> int | None:
    """Bytes that are free where ``place`` is or will be; None where the system does not say."""
    there = next((path for path in (place, *place.absolute().parents) if path.exists()), Path("/"))
    with contextlib.suppress(OSError):
        return shutil.disk_usage(there).free
    return None


def _bytes(count: int) -> str:
    """In the unit that leaves a number worth reading."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= 10 * size:
            return f"{count / size:,.0f} {unit}"
    return f"{count:,} bytes"
