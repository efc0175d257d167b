"""A model over the processes of a mesh: allocated, cut, drawn or filled where its parts live."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from consilium.config.model import Model
from consilium.model.build import allocate
from consilium.model.decoder import Decoder
from consilium.model.init import first_experts, initialise
from consilium.moe.all_to_all import over
from consilium.parallel.mesh import Mesh


def allocated(
    config: Model, mesh: Mesh, device: str = "cpu", *, dtype: torch.dtype = torch.float32
) -> Decoder:
    """A model of which this process has its part, still to be written."""
    model = allocate(
        config, dtype=dtype, device=device, transports=over(mesh.expert), processes=mesh.world.size
    )
    alone = [*model.layers, *(module.block for module in model.mtp), *model.mtp, model.embed]
    ends = [] if config.tied else [model.head]
    mesh.sharding.shard(model, (*alone, *ends), [moe.experts for moe in model.moe_modules().values()])
    return model


def drawn(config: Model, seed: int, mesh: Mesh, device: str = "cpu") -> Decoder:
    """The model of ``seed``: the same weights as in one process."""
    model = allocated(config, mesh, device)
    initialise(model, config.init, seed, mesh.sharding.part)
    return model


@torch.no_grad()
def fill(model: Decoder, whole: Mapping[str, Tensor], mesh: Mesh) -> None:
    """Write this process's part of weights that are all in ``whole``; balance state is everybody's."""
    first = first_experts(model)
    for name, tensor in model.state_dict().items():
        part = mesh.sharding.part(tensor)
        begin = first.get(name, 0) + part.rows.start
        source = whole[name]
        part.here.copy_(source[begin : begin + len(part.rows)] if tensor.ndim else source)


def stamped(state: Mapping[str, Tensor], model: Decoder, mesh: Mesh) -> dict[str, int]:
    """Which row each tensor of optimizer state (``weight:field``) begins with, where it is of a part alone.

    Two processes that have the same rows write them once.
    """
    rows = _rows(model, mesh)
    return {
        key: rows[key.rpartition(":")[0]].start
        for key, tensor in state.items()
        if tensor.ndim and key.rpartition(":")[0] in rows
    }


def rows_of(model: Decoder, mesh: Mesh) -> Callable[[str, int], range]:
    """Which rows of a tensor of optimizer state are this process's."""
    rows = _rows(model, mesh)
    return lambda key, count: rows.get(key.rpartition(":")[0], range(count))


def _rows(model: Decoder, mesh: Mesh) -> dict[str, range]:
    """By parameter: the rows of the whole that are here."""
    first = first_experts(model)
    found: dict[str, range] = {}
    for name, parameter in model.named_parameters():
        rows, begin = mesh.sharding.part(parameter).rows, first.get(name, 0)
        found[name] = range(begin + rows.start, begin + rows.stop)
    return found
