"""A disk that stops, fails or loses power at any operation of a write."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from consilium.disk.files import DISK, Chunk

Loss = Literal["nothing", "data", "zeros", "everything"]
"""What was not synced and is gone: nothing (the process died), contents, all but their length, names too."""
LOSSES: tuple[Loss, ...] = ("nothing", "data", "zeros", "everything")


class Crash(BaseException):
    """The process is gone: nothing it still wants to do happens."""


@dataclass
class CrashingDisk:
    """The real disk, counting operations. Operation ``at`` does not happen.

    Without ``error`` nothing after it happens either; with ``error`` it alone fails, or with ``full`` every
    later one that needs space too. It remembers by inode what a sync made durable.
    """

    root: Path
    at: int
    error: int | None = None
    full: bool = False
    count: int = 0
    contents: dict[int, bytes] = field(default_factory=dict)
    names: dict[int, dict[str, int]] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for path in [self.root, *self.root.rglob("*")]:
            self._remember_folder(path) if path.is_dir() else self._remember_file(path)

    def make_folder(self, path: Path) -> None:
        self._step(lambda: DISK.make_folder(path))

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        self._step(lambda: DISK.write(path, []))
        for chunk in chunks:
            self._step(lambda chunk=chunk: _append(path, chunk))

    def append(self, path: Path, chunk: Chunk) -> None:
        self._step(lambda: DISK.append(path, chunk))

    def truncate(self, path: Path, size: int) -> None:
        self._step(lambda: DISK.truncate(path, size))

    def sync_file(self, path: Path) -> None:
        self._step(lambda: self._remember_file(path), needs_space=False)

    def sync_folder(self, path: Path) -> None:
        self._step(lambda: self._remember_folder(path), needs_space=False)

    def rename(self, source: Path, target: Path) -> None:
        if target.exists():
            self._hold(target)
        self._step(lambda: DISK.rename(source, target))

    def unlink(self, path: Path) -> None:
        self._hold(path)
        self._step(lambda: DISK.unlink(path), needs_space=False)

    def remove_folder(self, path: Path) -> None:
        self._hold(path)
        self._step(lambda: DISK.remove_folder(path), needs_space=False)

    def after(self, loss: Loss, target: Path) -> Path:
        """Lay out at ``target`` what a restart finds."""
        self._restore(self.root.stat().st_ino, self.root, target, loss)
        return target

    def close(self) -> None:
        for descriptor in self.held:
            os.close(descriptor)

    def _step(self, action: Callable[[], None], *, needs_space: bool = True) -> None:
        self.count += 1
        if self.error is None and self.count >= self.at:
            raise Crash
        if self.error is not None and (
            self.count == self.at or (self.full and needs_space and self.count > self.at)
        ):
            raise OSError(self.error, os.strerror(self.error))
        action()

    def _hold(self, path: Path) -> None:
        """Keep the inode number from being given to another file while we remember it."""
        self.held.append(os.open(path, os.O_RDONLY))

    def _remember_file(self, path: Path) -> None:
        self.contents[path.stat().st_ino] = path.read_bytes()

    def _remember_folder(self, path: Path) -> None:
        self.names[path.stat().st_ino] = {child.name: child.stat().st_ino for child in path.iterdir()}
        for child in path.iterdir():
            if child.is_dir():
                self.names.setdefault(child.stat().st_ino, {})

    def _restore(self, inode: int, now: Path, target: Path, loss: Loss) -> None:
        target.mkdir()
        kept = self.names[inode]
        if loss != "everything":
            kept = {child.name: child.stat().st_ino for child in now.iterdir()}
        for name, child in kept.items():
            if child in self.names or (now / name).is_dir():
                self.names.setdefault(child, {})
                self._restore(child, now / name, target / name, loss)
            else:
                (target / name).write_bytes(self._left(child, now / name, loss))

    def _left(self, inode: int, now: Path, loss: Loss) -> bytes:
        synced = self.contents.get(inode, b"")
        match loss:
            case "nothing":
                return now.read_bytes()
            case "zeros":
                return synced.ljust(now.stat().st_size, b"\0")
            case "data" | "everything":
                return synced


def _append(path: Path, chunk: Chunk) -> None:
    with path.open("ab") as file:
        file.write(chunk)
