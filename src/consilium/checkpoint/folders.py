"""What a folder stands for: a run folder for its newest complete checkpoint, a checkpoint for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from consilium.disk import atomic
from consilium.errors import ConsiliumError
from consilium.recipes import catalogue

GGUF: Final = ".gguf"
"""Suffix of a file that is a model by itself."""
CHECKPOINTS: Final = "checkpoints"
"""The folder of a run that holds its ``step-N``."""


def newest_of_run(folder: Path) -> Path:
    """Return the newest complete checkpoint of a run, and any other folder as it is.

    Raises ConsiliumError for a run that has none, or whose newest was changed.
    """
    if (folder / "config.json").exists() or not (folder / CHECKPOINTS).is_dir():
        return folder
    newest = atomic.latest(folder / CHECKPOINTS)
    if newest is None:
        raise ConsiliumError(
            f"{folder} has no complete checkpoint yet; continue it with consilium train ... --resume."
        )
    return newest


def checkpoint_in(folder: Path) -> Path:
    """Return the checkpoint that ``folder`` is or holds. Raises ConsiliumError that says how to get one."""
    found = newest_of_run(folder)
    if (found / "config.json").exists() or (found.suffix == GGUF and found.is_file()):
        return found
    name = str(folder)
    if name.partition(":")[0] in catalogue.names():
        raise ConsiliumError(
            f"{name} is a recipe without weights; train it first: consilium train {name} --out runs/x."
        )
    if not folder.exists() and name.count("/") == 1 and not folder.parent.exists():
        raise ConsiliumError(
            f"no folder {name}; a hub id is not fetched here: hf download {name} --local-dir {folder.name},"
            f" then give {folder.name}."
        )
    what = "no such folder" if not folder.exists() else "it has neither config.json nor checkpoints"
    raise ConsiliumError(
        f"{folder} is not a checkpoint or a run: {what}; give a folder made by consilium train, or a"
        " downloaded one."
    )
