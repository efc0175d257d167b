"""MODEL on the command line: what names a configuration."""

from __future__ import annotations

import re
from pathlib import Path

from consilium.config.model import Model
from consilium.errors import ConsiliumError
from consilium.recipes.catalogue import names, parse, recipe


def read_model(text: str) -> Model:
    """Return the configuration that MODEL names: ``name[:size]``, a .yaml file, or a folder with one.

    A recipe's name wins over a folder of the same name; write ``./name`` for the folder. Raises
    ConsiliumError when it is neither.
    """
    path = Path(text)
    if text.partition(":")[0] in names():
        return recipe(text)
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".gguf":
        from consilium.checkpoint.gguf.keys import model_of
        from consilium.ops.gguf import read_header

        return model_of(read_header(path))
    if path.suffix in (".yaml", ".yml"):
        return _read_yaml(path)
    if path.is_file():
        raise ConsiliumError(f"{text} is no model; give a recipe, a folder, a .yaml or a .gguf file.")
    if text != path.name:
        from consilium.checkpoint.folders import missing

        raise ConsiliumError(missing(text))
    return recipe(text)


def full_name(text: str) -> str:
    """Return MODEL with the size it means: ``deepseek-v3:671b`` for ``deepseek-v3``, a path as it is."""
    if text.partition(":")[0] not in names():
        return text
    found, size = parse(text)
    return f"{found.name}:{size}"


def _read_yaml(path: Path) -> Model:
    """Read a model, or the model of a complete training run."""
    from consilium.config.io import from_yaml, read_text
    from consilium.config.training import Training

    text = read_text(path)
    if re.search(r"^model:", text, re.MULTILINE):
        return from_yaml(Training, text, where=str(path)).model
    return from_yaml(Model, text, where=str(path))


def _read_folder(folder: Path) -> Model:
    """Read a run folder's config.yaml, or the config.json of a checkpoint, ours or Hugging Face's."""
    from consilium.checkpoint.hf.config import config_from_folder
    from consilium.records.run import CONFIG_FILE

    if (folder / CONFIG_FILE).is_file():
        return _read_yaml(folder / CONFIG_FILE)
    return config_from_folder(folder)
