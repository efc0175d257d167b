from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings

from consilium.config.model import Model
from consilium.model.build import build
from consilium.model.decoder import Decoder
from consilium.planner.parameters import parameters
from consilium.recipes.catalogue import find, names, recipe
from planner.planner_configs import models, tensors

MODELS = [f"{name}:{size}" for name in names() for size in find(name).sizes]


@functools.cache
def on_meta(name: str) -> Decoder:
    return build(recipe(name), device="meta")


@pytest.mark.parametrize("name", MODELS)
def test_the_planner_counts_what_is_built(name: str) -> None:
    counts = parameters(recipe(name))
    built = on_meta(name)
    sizes = {key: value.numel() for key, value in built.named_parameters()}
    assert sum(value for key, value in sizes.items() if not key.startswith("mtp.")) == counts.total
    assert sum(sizes.values()) == counts.total + counts.mtp


@pytest.mark.parametrize("name", MODELS)
def test_the_planner_counts_the_buffers_that_are_saved(name: str) -> None:
    built = on_meta(name)
    trained = {key for key, _ in built.named_parameters(remove_duplicate=False)}
    saved = {key: value for key, value in built.state_dict().items() if key not in trained}
    assert all(value.dtype == torch.float32 for value in saved.values())
    counted = sum(value.numel() for key, value in saved.items() if not key.startswith("mtp."))
    assert counted == parameters(recipe(name)).buffers


@given(models)
@settings(max_examples=25)
def test_a_built_model_has_the_tensors_that_its_description_promises(config: Model) -> None:
    built = build(config, device="meta")
    assert {name: tuple(value.shape) for name, value in built.named_parameters()} == dict(tensors(config))
