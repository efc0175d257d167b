"""Whether a folder of weights is what was saved or published, said of every file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from consilium.checkpoint.folders import checkpoint_in
from consilium.checkpoint.store import open_folder
from consilium.disk import manifest
from consilium.errors import ConsiliumError


@dataclass(frozen=True, slots=True)
class FolderReport:
    """``sealed``: there is a manifest, so every byte was compared; else names, shapes and sizes alone."""

    folder: Path
    sealed: bool
    files: int
    bytes: int
    faults: tuple[str, ...]
    """A sentence each; none where all is well."""


def verify_folder(
    folder: Path | str, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> FolderReport:
    """Compare every file of a checkpoint, or of a run's newest, with its manifest, and weights with config.

    ``progress`` hears of bytes done and in all. Raises ConsiliumError where there is no such folder.
    """
    folder = checkpoint_in(folder)
    sealed = (folder / manifest.NAME).exists()
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()] or [folder.stat().st_size]
    done = 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        progress(done, sum(sizes))

    found: list[str] = []
    try:
        found += [str(fault) for fault in (manifest.faults(folder, read=read) if sealed else ())]
        if not found:
            open_folder(folder, packed=True)
    except ConsiliumError as error:
        found.append(str(error))
    return FolderReport(folder, sealed, len(sizes), sum(sizes), tuple(found))
