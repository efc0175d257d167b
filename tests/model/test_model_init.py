"""Random weights: a function of the seed, the tensor's name and the expert, and of nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from consilium.config.model import FanIn, Model
from consilium.errors import ConsiliumError
from consilium.model.build import allocate, build
from consilium.model.init import initialise
from consilium.moe.all_to_all import over
from consilium.moe.layer import MoELayer
from consilium.parallel.group import Group
from small import DEEPSEEK, DENSE, KINDS, SWITCH

kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


class Draws(TorchDispatchMode):
    """Counts the random values that are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.values += args[0].numel()
        return func(*args, **(kwargs or {}))


def with_experts(config: Model, count: int) -> Model:
    assert config.moe is not None
    router = dataclasses.replace(
        config.moe.router, select=dataclasses.replace(config.moe.router.select, groups=None)
    )
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, experts=count, router=router))


@kinds
def test_building_draws_each_matrix_once_and_leaves_the_global_generator(config: Model) -> None:
    before = torch.get_rng_state()
    with Draws() as draws:
        model = build(config, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert draws.values == sum(p.numel() for p in model.parameters() if p.ndim > 1)


@kinds
def test_allocating_draws_nothing(config: Model) -> None:
    with Draws() as draws:
        allocate(config, dtype=torch.float32, device="cpu")
    assert draws.values == 0


@pytest.mark.parametrize("kind", [DEEPSEEK, SWITCH], ids=["deepseek", "switch"])
def test_an_expert_is_the_same_whoever_is_beside_it(kind: Model) -> None:
    """Half the experts, and half the layers: every tensor that both have is the same, row by row."""
    whole = build(with_experts(kind, 8), seed=5).state_dict()
    half = with_experts(dataclasses.replace(kind, layers=2, mtp=dataclasses.replace(kind.mtp, depth=0)), 4)
    compared = 0
    for name, tensor in build(half, seed=5).state_dict().items():
        if name.endswith((".experts.up", ".experts.down")):
            assert torch.equal(tensor, whole[name][:4]), name
            compared += 1
        elif ".router." not in name and tensor.shape == whole[name].shape:
            assert torch.equal(tensor, whole[name]), name
    assert compared >= 2


def test_experts_layers_matrices_and_seeds_all_differ() -> None:
    model = build(DEEPSEEK, seed=0)
    matrices: list[Tensor] = []
    for tensor in (*model.parameters(), *build(DEEPSEEK, seed=1).parameters()):
        matrices += (
            list(tensor.detach()) if tensor.ndim == 3 else [tensor.detach()] if tensor.ndim == 2 else []
        )
    beginnings = {tuple(matrix.flatten()[:8].tolist()) for matrix in matrices}
    assert len(beginnings) == len(matrices)


@pytest.mark.parametrize("init", [DEEPSEEK.init, FanIn(scale=0.5)], ids=["normal", "fan in"])
def test_a_matrix_is_what_its_name_says(init: Any) -> None:
    """The stream of one expert, by hand."""
    model = build(dataclasses.replace(DEEPSEEK, init=init), seed=9)
    name = "layers.1.moe.experts.down"
    digest = hashlib.sha256(f"9/{name}/5".encode()).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    expected = torch.empty(32, 16)
    if isinstance(init, FanIn):
        std = (0.5 / 16) ** 0.5
        torch.nn.init.trunc_normal_(expected, std=std, a=-2 * std, b=2 * std, generator=stream)
    else:
        expected.normal_(0, 0.02, generator=stream)
    assert torch.equal(model.get_parameter(name)[5], expected)


@kinds
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_dtype_is_the_float32_model_rounded(config: Model, dtype: str) -> None:
    exact, rounded = build(config, seed=1), build(config, seed=1, dtype=dtype)
    for (name, one), two in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(one.to(two.dtype), two), name
        assert str(two.dtype) == f"torch.{dtype}"


def test_a_part_is_initialised_in_any_order_of_modules() -> None:
    """An MoE layer by itself, under the names that it has in the model."""
    model = build(DEEPSEEK, seed=2)
    alone = torch.nn.Module()
    alone.layers = torch.nn.ModuleDict({"2": torch.nn.Module(), "1": torch.nn.Module()})
    assert DEEPSEEK.moe is not None
    for layer in (2, 1):
        alone.layers[str(layer)].moe = MoELayer(DEEPSEEK.moe, DEEPSEEK.hidden_size, layer)
    initialise(alone, DEEPSEEK.init, 2)
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_experts_are_built_where_they_live_with_the_weights_of_one_process() -> None:
    """The second of four processes: no stack is larger than its share, and no other expert is drawn."""
    whole = build(DEEPSEEK, seed=4)
    with Draws() as draws:
        part = build(DEEPSEEK, seed=4, transports=over(Group(rank=1, size=4)))
    for name, parameter in part.named_parameters():
        expected = whole.get_parameter(name)
        if ".experts." in name:
            expected = expected[2:4]
        assert torch.equal(parameter, expected), name
    assert draws.values == sum(p.numel() for p in part.parameters() if p.ndim > 1)


def test_a_model_beyond_memory_is_refused_in_the_dtype_it_would_have() -> None:
    huge = dataclasses.replace(DENSE, vocab_size=2**30, hidden_size=4096)
    with pytest.raises(ConsiliumError, match="bfloat16"):
        build(huge, dtype="bfloat16")
