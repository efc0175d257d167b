"""Every recipe and size: the planner counts what is built, without building it."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings

from consilium.config.model import Model
from consilium.model.build import build
from consilium.model.decoder import Decoder
from consilium.planner.parameters import parameters
from consilium.planner.shapes import parts, shapes
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
    tables = {key for key in saved if key.endswith(".moe.router.table")}
    assert bool(tables) == name.startswith("hash")
    saved = {key: value for key, value in saved.items() if key not in tables}
    assert all(value.dtype == torch.float32 for value in saved.values())
    counted = sum(value.numel() for key, value in saved.items() if not key.startswith("mtp."))
    assert counted == parameters(recipe(name)).buffers


@pytest.mark.parametrize("name", MODELS)
def test_the_planner_names_every_tensor_that_is_built(name: str) -> None:
    built = {key: tuple(value.shape) for key, value in on_meta(name).named_parameters()}
    assert dict(shapes(recipe(name))) == built


@given(models)
@settings(max_examples=25)
def test_a_built_model_has_the_tensors_that_its_description_promises(config: Model) -> None:
    built = build(config, device="meta")
    assert {name: tuple(value.shape) for name, value in built.named_parameters()} == dict(tensors(config))


@given(models)
def test_shapes_are_those_of_an_independent_list(config: Model) -> None:
    assert dict(shapes(config)) == dict(tensors(config))


@given(models)
def test_parts_tell_each_kind_of_block_once_and_leave_nothing_out(config: Model) -> None:
    told = {(name, shape) for part in parts(config) for name, shape in part.tensors}
    bare = {(within(name), shape) for name, shape in shapes(config)}
    assert told == bare
    assert len({part.name for part in parts(config)}) == len(parts(config))


def within(name: str) -> str:
    """The name of a tensor from its block or module on."""
    owner, *rest = name.split(".")
    return ".".join(rest[1:]) if owner in {"layers", "mtp"} else name


def test_parts_are_named_after_their_layers() -> None:
    def told(name: str) -> list[str]:
        return [part.name for part in parts(recipe(name))]

    assert told("deepseek-v3") == ["model", "layers 0-2", "layers 3-60", "mtp 0"]
    assert told("deepseek-v2") == ["model", "layer 0", "layers 1-59"]
    assert told("switch:base") == ["model", "layers 0, 2, ..., 22", "layers 1, 3, ..., 23"]
    assert told("switch:tiny") == ["model", "layers 0, 2", "layers 1, 3"]
    assert told("llama:7b") == ["model", "layers 0-31"]


def test_the_largest_stack_of_experts_is_what_is_published() -> None:
    """131,072 experts of about a million weights (1701.06538 table 8)."""
    stacked = dict(shapes(recipe("shazeer:131072-h")))
    assert stacked["layers.1.moe.experts.up"] == (131072, 1024, 512)
    assert math.prod(stacked["layers.1.moe.experts.up"]) * 2 == 131072 * 2**20
