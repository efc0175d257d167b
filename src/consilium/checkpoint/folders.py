"""What a folder stands for: a run folder for its newest complete checkpoint, a checkpoint for itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from consilium.checkpoint.hf.config import NAME as CONFIG_FILE
from consilium.errors import ConsiliumError
from consilium.recipes import catalogue
from consilium.records.run import CONFIG_FILE as RUN_CONFIG
from consilium.records.run import newest_of_run

GGUF: Final = ".gguf"
"""Suffix of a file that is a model by itself."""


def check_vocabulary(tokens: int, size: int, where: Path | str = "the tokenizer") -> None:
    """Raise ConsiliumError where a tokenizer, read from ``where``, has more tokens than a model of ``size``.

    Every pairing of a tokenizer and a model passes here: ids that the model lacks have no embedding.
    """
    if tokens > size:
        raise ConsiliumError(
            f"{where} has {tokens:,} tokens and the model {size:,}; use the tokenizer of this model."
        )


def checkpoint_in(folder: Path | str) -> Path:
    """Return the checkpoint that ``folder`` is or holds. Raises ConsiliumError that says how to get one."""
    folder = Path(folder)
    found = newest_of_run(folder, CONFIG_FILE)
    if (found / CONFIG_FILE).exists() or (found.suffix == GGUF and found.is_file()):
        return found
    if not folder.exists():
        raise ConsiliumError(missing(str(folder)))
    if (folder / RUN_CONFIG).is_file():
        raise ConsiliumError(
            f"{folder} is a run that has saved no checkpoint yet; wait for one, or train it on with --resume."
        )
    raise ConsiliumError(
        f"{folder} is not a checkpoint or a run: it has neither config.json nor checkpoints; give a folder"
        " made by consilium train, or a downloaded one."
    )


def refuse_inside(verb: str, source: Path, destination: Path) -> None:
    """Raise ConsiliumError where ``destination`` is ``source`` or lies in it: what is read stays as it is."""
    one, other = source.resolve(), destination.resolve()
    if one == other:
        raise ConsiliumError(f"{destination} is the folder to {verb}; give the name of a new folder.")
    if one in other.parents:
        raise ConsiliumError(
            f"{verb}: {destination} lies inside {source}, which is to stay as it is; choose a place outside."
        )


def missing(name: str) -> str:
    """What to say of a folder ``name`` that is not there: a recipe, a name on the hub, or a slip."""
    if name.partition(":")[0] in catalogue.names():
        return (
            f"no such folder here, and {name} is a recipe without weights; train it first:"
            f" consilium train {name} --out runs/x."
        )
    if is_hub_name(name):
        short = name.rpartition("/")[2]
        return (
            f"no such folder here: {name}; names on the Hugging Face hub are not fetched: run hf download"
            f" {name} --local-dir {short} and give the folder {short}."
        )
    if name.endswith(GGUF):
        return f"no such file: {name}; give a GGUF file that is there."
    return f"no such folder: {name}; give a folder made by consilium train, or a downloaded one."


def is_hub_name(name: str) -> bool:
    """Whether ``name`` is an owner and a model, rather than a folder of a folder that is or was to be here.

    Models on the hub say their size or version: a name in small letters alone is a folder's.
    """
    owner = name.partition("/")[0]
    plain = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)
    return plain is not None and name != name.lower() and owner != "runs" and not Path(owner).exists()
