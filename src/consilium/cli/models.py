"""MODEL on the command line: what names a configuration."""

from __future__ import annotations

from pathlib import Path

from consilium.config.model import Model
from consilium.errors import ConsiliumError
from consilium.recipes.catalogue import names, parse, recipe


def read_model(text: str) -> Model:
    """Return the configuration that MODEL names: ``name[:size]``, a .yaml file, or a folder with one.

    A recipe's name wins over a folder of the same name; write ``./name`` for the folder. Raises
    ConsiliumError when it is neither.
    """
    if text.partition(":")[0] in names():
        return recipe(text)
    from consilium.checkpoint.described import model_at

    path = Path(text)
    if (found := model_at(path)) is not None:
        return found
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
