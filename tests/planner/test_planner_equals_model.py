from __future__ import annotations

import pytest
import torch

from consilium.model.build import build
from consilium.planner.parameters import parameters
from consilium.recipes.catalogue import find, names

MODELS = [f"{name}:{size}" for name in names() for size in find(name).sizes]


@pytest.mark.parametrize("name", MODELS)
def test_the_planner_counts_what_is_built(name: str) -> None:
    recipe, _, size = name.partition(":")
    config = find(recipe).model(size)
    counts = parameters(config)
    built = build(config, device="meta")
    sizes = {key: value.numel() for key, value in built.named_parameters()}
    assert sum(value for key, value in sizes.items() if not key.startswith("mtp.")) == counts.total
    assert sum(sizes.values()) == counts.total + counts.mtp


@pytest.mark.parametrize("name", MODELS)
def test_the_planner_counts_the_buffers_that_are_saved(name: str) -> None:
    recipe, _, size = name.partition(":")
    config = find(recipe).model(size)
    built = build(config, device="meta")
    trained = {key for key, _ in built.named_parameters(remove_duplicate=False)}
    saved = {key: value for key, value in built.state_dict().items() if key not in trained}
    assert all(value.dtype == torch.float32 for value in saved.values())
    counted = sum(value.numel() for key, value in saved.items() if not key.startswith("mtp."))
    assert counted == parameters(config).buffers
