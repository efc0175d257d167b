"""The file operations whose order makes a checkpoint crash-safe, behind a protocol that tests can stop."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Protocol, final

from consilium.errors import ConsiliumError

Chunk = bytes | memoryview


class Filesystem(Protocol):
    """Everything that changes the disk. Reading needs no protocol: it cannot lose anything."""

    def make_folder(self, path: Path) -> None: ...

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        """Create ``path``; it must not exist."""
        ...

    def sync_file(self, path: Path) -> None: ...

    def sync_folder(self, path: Path) -> None:
        """Make the names inside ``path`` durable."""
        ...

    def rename(self, source: Path, target: Path) -> None: ...

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

    def sync_file(self, path: Path) -> None:
        self._sync(path, os.O_RDWR)

    def sync_folder(self, path: Path) -> None:
        if os.name == "posix":
            self._sync(path, os.O_RDONLY)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        path.rmdir()

    def _sync(self, path: Path, flags: int) -> None:
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


DISK: Final = Disk()


def make_parents(folder: Path, files: Filesystem) -> None:
    """Create ``folder`` and what is missing above it, each name durable in its parent."""
    if not folder.exists():
        make_parents(folder.parent, files)
        files.make_folder(folder)
        files.sync_folder(folder.parent)


def remove_tree(folder: Path, files: Filesystem) -> None:
    """Remove ``folder`` and everything in it; links are removed, never followed."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            remove_tree(path, files)
        else:
            files.unlink(path)
    files.remove_folder(folder)


def write_failure(error: OSError, destination: Path) -> ConsiliumError:
    """Say in one sentence why ``destination`` was not written and what to do."""
    start = f"cannot save to {destination}: "
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            why = (
                f"no space left on the disk ({_free(destination)}); free some space or choose another folder"
            )
        case errno.EACCES | errno.EPERM | errno.EROFS:
            why = "no permission to write there; choose another folder or change its permissions"
        case errno.EIO:
            why = "the disk reported an input/output error; check the disk or choose another folder"
        case _:
            why = f"{(error.strerror or str(error)).lower()}; choose another folder"
    return ConsiliumError(f"{start}{why}; what was saved before is unchanged.")


def _free(destination: Path) -> str:
    there = next((path for path in destination.parents if path.exists()), Path("/"))
    return f"{shutil.disk_usage(there).free / 2**20:,.0f} MiB free"
