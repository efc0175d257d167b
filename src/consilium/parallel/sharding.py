"""Parameters over several processes, by FSDP2: the first axis is cut into equal parts, one a process.

FSDP2 adds up gradients over the processes of its mesh. It would also divide by their number; here it does
not, because every loss is divided by the tokens of all processes before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from consilium.parallel.part import Part, whole
from consilium.parallel.watch import Watch


@final
@dataclass(frozen=True, slots=True)
class FullySharded:
    """Over which processes parameters lie, by kind; with replicas each mesh has two directions."""

    everybody: DeviceMesh
    """All processes of a replica."""
    same_experts: DeviceMesh
    """Those that have the same experts."""
    watch: Watch
    """Over the processes of a replica."""
    _plain: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    """By sharded parameter: the plain one of what is here, which lives as long."""

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

    def like(self, tensor: Tensor, here: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return here
        mesh, placements = tensor.device_mesh, tensor.placements
        return DTensor.from_local(
            here, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    @torch.no_grad()
    def gathered(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor.detach()
        with self.watch.over("gather of a weight"):
            return tensor.full_tensor()

    @contextmanager
    def local(self, model: nn.Module) -> Iterator[None]:
        sharded = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if isinstance(parameter, DTensor)
        ]
        for module, name, parameter in sharded:
            module.register_parameter(name, self._as_plain(parameter))
        try:
            yield
        finally:
            for module, name, parameter in sharded:
                plain = module.get_parameter(name)
                plain.grad = None
                module.register_parameter(name, parameter)

    def _as_plain(self, parameter: nn.Parameter) -> nn.Parameter:
        assert isinstance(parameter, DTensor)
        if parameter not in self._plain:
            here = parameter.to_local().detach()
            self._plain[parameter] = nn.Parameter(here, requires_grad=parameter.requires_grad)
        plain: nn.Parameter = self._plain[parameter]
        plain.grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else None
        return plain


def _shard(module: nn.Module, mesh: DeviceMesh) -> None:
    # The outermost module would stay gathered after a forward without a backward, and its weights unseen.
    sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
    assert isinstance(sharded, FSDPModule)
    sharded.set_force_sum_reduction_for_comms(True)
    sharded.set_gradient_divide_factor(1.0)
