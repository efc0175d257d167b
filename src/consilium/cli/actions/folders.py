"""FOLDER arguments: a run folder stands for its newest complete checkpoint, a checkpoint for itself."""

from __future__ import annotations

from pathlib import Path

from consilium.checkpoint import atomic
from consilium.errors import ConsiliumError
from consilium.recipes import catalogue
from consilium.training.files import CHECKPOINTS


def checkpoint_in(folder: Path) -> Path:
    """Return the checkpoint that ``folder`` is or holds. Raises ConsiliumError that says how to get one."""
    if (folder / "config.json").exists():
        return folder
    if (folder / CHECKPOINTS).is_dir():
        newest = atomic.latest(folder / CHECKPOINTS)
        if newest is not None:
            return newest
        raise ConsiliumError(
            f"{folder} has no complete checkpoint yet; continue it with consilium train ... --resume."
        )
    name = str(folder)
    if name.partition(":")[0] in catalogue.names():
        raise ConsiliumError(
            f"{name} is a recipe without weights; train it first: consilium train {name} --out runs/x."
        )
    if not folder.exists() and name.count("/") == 1:
        raise ConsiliumError(
            f"no folder {name}; a hub id is not fetched here: hf download {name} --local-dir {folder.name},"
            f" then give {folder.name}."
        )
    what = "no such folder" if not folder.exists() else "it has neither config.json nor checkpoints"
    raise ConsiliumError(
        f"{folder} is not a checkpoint or a run: {what}; give a folder made by consilium train."
    )
