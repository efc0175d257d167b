"""A step over several processes against the same step in one: loss, gradients, norm, loads, bias, weights.

Legend: EP processes that share experts, DP processes that hold the same ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from consilium.config import io
from consilium.config.model import Model
from consilium.config.optimizer import Muon
from consilium.config.training import Training
from consilium.data.batch import Batch
from consilium.model.decoder import Decoder
from consilium.model.init import first_experts
from consilium.parallel.mesh import ALONE, Mesh
from consilium.parallel.topology import Topology
from consilium.recipes.variants import with_balance
from consilium.training.optimizer import build_optimizer
from consilium.training.spread import allocated
from consilium.training.step import StepResult, gradients, update
from processes import fill, together
from small import DEEPSEEK, SWITCH, lively, random_batch
from support import relative_error

STEPS = 2
CLIP = 0.3


@dataclasses.dataclass(frozen=True)
class Rows:
    """Stands for the loader: micro-batches of different lengths and documents."""

    least: int = 1

    def micro(self, step: int, index: int, count: int) -> Batch:
        return random_batch(self.least + index % 2, 24, seed=step * count + index)


def configuration(model: Model, **changes: object) -> Training:
    return dataclasses.replace(Training(model=model, steps=10, batch=4, accumulate=4), **changes)


def spread(config: Model, mesh: Mesh, dtype: torch.dtype, *, overlap: bool) -> Decoder:
    model = allocated(config, mesh, overlap=overlap, dtype=dtype)
    fill(model, lively(config).state_dict(), mesh)
    return model


def trained(config: Training, mesh: Mesh, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[StepResult]]:
    """Whole tensors after some steps, and the last step's gradients; the optimizer is AdamW on both sides."""
    model = spread(config.model, mesh, dtype, overlap=config.overlap and mesh.world.size > 1)
    optimizer = build_optimizer(model, config.optimizer, mesh.sharding)
    rows = Rows(2 if config.overlap else 1)
    results: list[StepResult] = []
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        results.append(gradients(model, rows, config, step, mesh))
        if step == 0:
            found |= {f"grad {name}": value for name, value in whole_gradients(model, mesh).items()}
        update(model, optimizer, config, results[-1], mesh)
    found |= {f"weight {name}": value for name, value in whole(model.state_dict(), model, mesh).items()}
    return found, results


def whole_gradients(model: Decoder, mesh: Mesh) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values()), "experts without rows have zero gradients"
    return whole(grads, model, mesh)


def whole(tensors: Mapping[str, Tensor], model: Decoder, mesh: Mesh) -> dict[str, Tensor]:
    """Gathered over data and then, for stacks, over those who share experts."""
    stacks = first_experts(model)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        here = mesh.sharding.gathered(tensor)
        if name in stacks and mesh.expert.size > 1:
            every = here.new_zeros(mesh.expert.size, *here.shape)
            every[mesh.expert.rank] = here
            here = mesh.expert.sum(every).flatten(0, 1)
        found[name] = here.clone()
    return found


def numbers(result: StepResult) -> dict[str, Tensor]:
    scalars = {"loss": result.loss, "ce": result.ce, "ahead": result.ahead, "norm": result.norm}
    scalars |= {f"balance {name}": value for name, value in result.balance.items()}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()}


def test_heads_are_clipped_in_the_step_that_is_compared() -> None:
    assert all(bool((largest_H > CLIP).any()) for largest_H in in_one_process("muon")[1][0].largest.values())


Expected = tuple[dict[str, Tensor], list[StepResult]]


@functools.cache
def in_one_process(name: str, dtype: torch.dtype = torch.float32) -> Expected:
    """Made before processes are forked, which then all have it."""
    return trained(CONFIGURATIONS[name], ALONE, dtype)


def compare(name: str, mesh: Mesh, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> None:
    ours, results = trained(CONFIGURATIONS[name], mesh, dtype)
    expected, wanted = in_one_process(name, dtype)
    assert ours.keys() == expected.keys()
    for ours_at, at in zip(results, wanted, strict=True):
        for key, value in numbers(at).items():
            assert relative_error(numbers(ours_at)[key], value) < tolerance, key
        for layer, load in at.loads.items():
            assert ours_at.loads[layer].counts == load.counts, layer
            assert ours_at.loads[layer].wanted == load.wanted, layer
        for block, largest_H in at.largest.items():
            assert relative_error(ours_at.largest[block], largest_H) < tolerance, block
        assert ours_at.tokens == at.tokens
    for key, value in expected.items():
        assert relative_error(ours[key], value) < tolerance, key


UNGROUPED = io.replace(DEEPSEEK, {"moe.router.select.groups": "null"})
CONFIGURATIONS = {
    "deepseek": configuration(DEEPSEEK),
    "deepseek, recomputed": configuration(DEEPSEEK, recompute=True),
    "deepseek, overlapped": configuration(DEEPSEEK, overlap=True),
    "overlapped and recomputed": configuration(DEEPSEEK, overlap=True, recompute=True),
    "switch, tied": configuration(SWITCH),
    "eight micro-batches": configuration(DEEPSEEK, batch=8, accumulate=8),
    "counts of the step": configuration(with_balance(DEEPSEEK, "step")),
    "muon": configuration(DEEPSEEK, optimizer=Muon(learning_rate=0.02, qk_clip=CLIP)),
    "muon, six micro-batches": configuration(
        SWITCH, batch=6, accumulate=6, optimizer=Muon(learning_rate=0.02)
    ),
    "quantiles": configuration(with_balance(UNGROUPED, "quantile-histogram")),
}
TOPOLOGIES = {
    "EP1 DP2": (Topology(data=2), ("deepseek", "switch, tied")),
    "EP2 DP1": (Topology(expert=2), ("deepseek", "switch, tied")),
    "EP2 DP2": (Topology(data=2, expert=2), ("deepseek", "deepseek, recomputed", "muon")),
    "EP1 DP3": (Topology(data=3), ("muon, six micro-batches",)),
    "EP4 DP1": (Topology(expert=4), ("counts of the step",)),
    "two replicas of EP2": (Topology(replicas=2, expert=2), ("quantiles", "muon")),
}


@pytest.mark.parametrize(("topology", "names"), TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_a_step_is_the_same_over_processes(topology: Topology, names: tuple[str, ...]) -> None:
    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        for name in names:
            compare(name, mesh)
        return {}

    for name in names:
        in_one_process(name)
    together(topology, work)


@pytest.mark.slow
@pytest.mark.parametrize("topology", [Topology(data=2, expert=4), Topology(data=4)], ids=str)
def test_a_step_is_the_same_over_more_processes(topology: Topology) -> None:
    names = ("eight micro-batches",)

    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        for name in names:
            compare(name, mesh)
        return {}

    for name in names:
        in_one_process(name)
    together(topology, work)


@pytest.mark.parametrize(
    ("names", "tolerance"),
    [(("deepseek",), 1e-9), (("deepseek, overlapped", "overlapped and recomputed"), 1e-5)],
    ids=["whole", "in halves"],
)
def test_in_float64_the_strength_of_every_loss_is_that_of_one_process(
    names: tuple[str, ...], tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs know float32 and bfloat16 alone; here the products are as wide as the weights.

    But for those of gates, which are float32: over half as many tokens they may round otherwise.
    """
    monkeypatch.setattr("consilium.training.step.torch_dtype", lambda name: torch.float64)

    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        for name in names:
            compare(name, mesh, torch.float64, tolerance)
        return {}

    for name in names:
        in_one_process(name, torch.float64)
    together(Topology(data=2, expert=2), work)
