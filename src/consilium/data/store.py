"""The cache of tokenized text on disk: whole entries, checked when read, rebuilt when damaged."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MANIFEST = "manifest.json"
Array = NDArray[Any]


def cache_folder() -> Path:
    """Return CONSILIUM_CACHE, else ``consilium`` under XDG_CACHE_HOME or ``~/.cache``."""
    if chosen := os.environ.get("CONSILIUM_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "consilium"


def write_entry(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files`` and a manifest of their hashes beside ``folder``, then rename them into its place.

    Raises OSError when the disk is full or not ours to write; nothing then stays behind.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}-", dir=folder.parent))
    try:
        for name, content in files.items():
            (made / name).write_bytes(content)
        manifest = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        (made / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        # A damaged entry, or one that another process has just written: equal content by its key.
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def entry_is_whole(folder: Path) -> bool:
    """Tell whether every file of the manifest is there with its hash."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all(_hash(folder / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def array_bytes(array: Array) -> bytes:
    """Return ``array`` as the content of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def open_array(path: Path) -> Array:
    """Map an .npy file into memory, read-only."""
    return np.load(path, mmap_mode="r", allow_pickle=False)
