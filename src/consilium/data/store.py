"""The cache of tokenized text on disk: whole entries, checked when read, rebuilt when damaged."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from consilium.disk import atomic, manifest
from consilium.disk.files import DISK, Filesystem
from consilium.disk.lock import held
from consilium.errors import ConsiliumError

Array = NDArray[Any]
_WAIT: Final = 3600.0
"""Seconds for which another process may be writing its entry: to encode a large file takes minutes."""


def write_entry(folder: Path, content: Mapping[str, bytes], *, files: Filesystem = DISK) -> None:
    """Write an entry of these files; errors are those of ``commit_entry``."""

    def write(staged: Path) -> None:
        for name, data in content.items():
            files.write(staged / name, [data])

    commit_entry(folder, write, files=files)


def commit_entry(folder: Path, write: Callable[[Path], None], *, files: Filesystem = DISK) -> None:
    """Let ``write`` fill an entry in the place of a damaged one; clear what killed processes left beside it.

    Who writes keeps the others waiting. Raises ConsiliumError when the disk is full or not ours to write;
    nothing then stays behind.
    """
    kept = folder.parent
    busy = f"another process has been writing to {kept} for {_WAIT / 60:.0f} minutes; wait for it."
    with held(kept.with_name(f"{kept.name}.lock"), busy=busy, wait=_WAIT, files=files) as alone:
        if alone:
            atomic.sweep(kept, files=files)
        if entry_is_whole(folder):  # by the other process
            return
        if folder.exists():
            atomic.remove(folder, files=files)
        atomic.commit_folder(folder, write, files=files)


def entry_is_whole(folder: Path) -> bool:
    """Tell whether every file of the manifest is there with its hash."""
    try:
        manifest.verify(folder)
    except ConsiliumError:
        return False
    return True


def array_bytes(array: Array) -> bytes:
    """Return ``array`` as the content of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def open_array(path: Path) -> Array:
    """Map an .npy file into memory, read-only."""
    return np.load(path, mmap_mode="r", allow_pickle=False)
