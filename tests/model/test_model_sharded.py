"""FSDP2 on one process: hooks of sharded modules fire, because training calls nothing but ``forward``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from consilium.config.model import Model
from consilium.config.training import Training
from consilium.data.batch import Batch
from consilium.model.decoder import Decoder
from consilium.training.optimizer import build_optimizer
from consilium.training.step import StepResult, train_step
from small import DEEPSEEK, SWITCH, lively, random_batch


class Rows:
    """Stands for the loader: the same documents at every step."""

    def micro(self, step: int, index: int, count: int) -> Batch:
        return random_batch(2, 24, seed=step * count + index)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.DeviceMesh]:
    """One gloo process over a file: nothing is asked of a network."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(config: Model, mesh: dist.DeviceMesh) -> Decoder:
    """Every block, prediction module and matrix over the vocabulary by itself, the rest as one."""
    model = lively(config)
    alone = [*model.layers, *(module.block for module in model.mtp), *model.mtp]
    for module in (*alone, model.embed) if config.tied else (*alone, model.embed, model.head):
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def stepped(model: Decoder, *, recompute: bool) -> tuple[StepResult, dict[str, Tensor], dict[str, Tensor]]:
    """A step's result, gradients before they are cleared and weights after it."""
    config = Training(model=model.config, steps=10, batch=4, accumulate=2, recompute=recompute)
    result = train_step(model, build_optimizer(model, config.optimizer), Rows(), config, 0)
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return result, gradients, {name: whole(tensor) for name, tensor in model.state_dict().items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("config", [DEEPSEEK, SWITCH], ids=["deepseek-v3", "tied"])
def test_a_sharded_step_is_the_step(config: Model, recompute: bool, mesh: dist.DeviceMesh) -> None:
    ours, gradients, weights = stepped(sharded(config, mesh), recompute=recompute)
    plain, expected, after = stepped(lively(config), recompute=recompute)
    assert (ours.loss, ours.ce, ours.ahead, ours.balance) == (
        plain.loss,
        plain.ce,
        plain.ahead,
        plain.balance,
    )
    assert gradients.keys() == expected.keys() == {name for name, _ in lively(config).named_parameters()}
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert all(torch.equal(weights[name], after[name]) for name in after)
