"""Parameters over several processes, by FSDP2: the first axis is cut into equal parts, one a process.

FSDP2 adds up gradients over the processes of its mesh. It would also divide by their number; here it does
not, because every loss is divided by the tokens of all processes before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from consilium.parallel.part import Part, whole


@final
@dataclass(frozen=True, slots=True)
class FullySharded:
    """Over which processes parameters lie, by kind; with replicas each mesh has two directions."""

    everybody: DeviceMesh
    """All processes of a replica."""
    same_experts: DeviceMesh
    """Those that have the same experts."""

    def shard(self, model: nn.Module, alone: Iterable[nn.Module], experts: Iterable[nn.Module]) -> None:
        for module in experts:
            _shard(module, self.same_experts)
        for module in (*alone, model):
            _shard(module, self.everybody)

    def part(self, tensor: Tensor) -> Part:
        if not isinstance(tensor, DTensor):
            return whole(tensor)
        direction = tensor.device_mesh.ndim - 1
        parts, index = tensor.device_mesh.size(direction), tensor.device_mesh.get_local_rank(direction)
        size = -(-tensor.shape[0] // parts)
        first = min(index * size, tensor.shape[0])
        here = tensor.to_local().detach()
        return Part(here, range(first, first + here.shape[0]))

    @torch.no_grad()
    def gathered(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _shard(module: nn.Module, mesh: DeviceMesh) -> None:
    sharded = fully_shard(module, mesh=mesh)
    assert isinstance(sharded, FSDPModule)
    sharded.set_force_sum_reduction_for_comms(True)
    sharded.set_gradient_divide_factor(1.0)
