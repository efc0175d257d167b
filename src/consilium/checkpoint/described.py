"""The configuration of a model at a path, whatever keeps it there; no weights are read."""

from __future__ import annotations

import re
from pathlib import Path

from consilium.checkpoint.gguf.keys import model_of
from consilium.checkpoint.hf.config import config_from_folder
from consilium.config.io import from_yaml, read_text
from consilium.config.model import Model
from consilium.config.training import Training
from consilium.ops.gguf import read_header
from consilium.records.run import CONFIG_FILE


def model_at(path: Path) -> Model | None:
    """The model of a .yaml or .gguf file, of a run's config.yaml, or of a checkpoint, ours or Hugging Face's.

    None where ``path`` is none of these. Raises ConsiliumError for one that is damaged.
    """
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".gguf":
        return model_of(read_header(path))
    return _of_yaml(path) if path.suffix in {".yaml", ".yml"} else None


def _of_yaml(path: Path) -> Model:
    """A model, or the model of a complete training run."""
    text = read_text(path)
    if re.search(r"^model:", text, re.MULTILINE):
        return from_yaml(Training, text, where=str(path)).model
    return from_yaml(Model, text, where=str(path))


def _of_folder(folder: Path) -> Model:
    run = folder / CONFIG_FILE
    return _of_yaml(run) if run.is_file() else config_from_folder(folder)
