"""Every recipe by name. A recipe is imported when it is asked for, so that planning one costs one import."""

from __future__ import annotations

import importlib
from types import MappingProxyType

from consilium.config.model import Model
from consilium.errors import ConsiliumError, nearest
from consilium.recipes.recipe import Recipe

_MODULES = MappingProxyType(
    {
        "llama": "consilium.recipes.llama",
        "jacobs": "consilium.recipes.jacobs",
        "dense-moe": "consilium.recipes.dense_moe",
        "shazeer": "consilium.recipes.shazeer",
        "gshard": "consilium.recipes.gshard",
        "switch": "consilium.recipes.switch",
        "hash": "consilium.recipes.hash",
        "expert-choice": "consilium.recipes.expert_choice",
        "mixtral": "consilium.recipes.mixtral",
        "llama-moe": "consilium.recipes.llama_moe",
        "deepseek-moe": "consilium.recipes.deepseek_moe",
        "deepseek-v2": "consilium.recipes.deepseek_v2",
        "deepseek-v3": "consilium.recipes.deepseek_v3",
        "qwen-moe": "consilium.recipes.qwen_moe",
        "qwen3-moe": "consilium.recipes.qwen3_moe",
        "olmoe": "consilium.recipes.olmoe",
        "nemotron-moe": "consilium.recipes.nemotron_moe",
        "latent-moe": "consilium.recipes.latent_moe",
        "grok-1": "consilium.recipes.grok_1",
        "skywork-moe": "consilium.recipes.skywork_moe",
        "qwen2": "consilium.recipes.qwen2",
        "qwen3": "consilium.recipes.qwen3",
    }
)

_OTHERS = MappingProxyType(
    {"mistral": "without its sliding window it is a LLaMA, and its mixture of experts is mixtral"}
)
"""What a hint would mistake for a slip of the finger."""


def names() -> tuple[str, ...]:
    """Names of all recipes, without importing any of them."""
    return tuple(_MODULES)


def find(name: str) -> Recipe:
    """Return the recipe called ``name``. Raises ConsiliumError with the nearest name."""
    if name in _OTHERS:
        raise ConsiliumError(f"{name} is no recipe here: {_OTHERS[name]}.")
    if name not in _MODULES:
        raise ConsiliumError(f"unknown recipe {name!r}.{nearest(name, _MODULES)}")
    found: object = importlib.import_module(_MODULES[name]).RECIPE
    assert isinstance(found, Recipe)
    return found


def systems() -> tuple[Recipe, ...]:
    """All recipes, oldest system first."""
    return tuple(sorted((find(name) for name in _MODULES), key=lambda recipe: (recipe.year, recipe.name)))


def parse(text: str) -> tuple[Recipe, str]:
    """Split ``name[:size]`` into a recipe and one of its sizes, the largest published when none is given."""
    name, colon, size = text.partition(":")
    found = find(name)
    chosen = size if colon else found.largest
    found.model(chosen)
    return found, chosen


def recipe(name: str, size: str | None = None) -> Model:
    """Return the configuration of a published system: ``recipe("deepseek-v3", size="671b")``.

    ``name`` may carry the size itself (``"deepseek-v3:671b"``). Raises ConsiliumError with the nearest
    name or size.
    """
    if size is not None:
        return find(name).model(size)
    found, chosen = parse(name)
    return found.model(chosen)
