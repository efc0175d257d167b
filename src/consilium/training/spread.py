"""A run over the processes of a mesh: who runs what, and a model whose parts live where they are used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

import consilium
from consilium.checkpoint.parts import every_row
from consilium.config import io
from consilium.config.generation import GenerationDefaults
from consilium.config.model import Model
from consilium.config.optimizer import AdamW, BlockState
from consilium.config.training import Training
from consilium.data.corpus import Corpus
from consilium.errors import ConsiliumError
from consilium.model.block import Block
from consilium.model.build import allocate
from consilium.model.decoder import Decoder
from consilium.model.init import first_experts, initialise
from consilium.model.overlapped import OverlappedBlock
from consilium.moe.all_to_all import over
from consilium.parallel.mesh import Mesh


def dealt(config: Training, mesh: Mesh) -> Training:
    """``config`` with a micro-batch for every process: the same run then means the same in one.

    Raises ConsiliumError for a batch that cannot be dealt, and for what a run over processes does not do.
    """
    world = mesh.world.size
    if world == 1:
        return config
    _refuse_alone(config)
    if config.overlap:
        _refuse_overlap(config, mesh)
    accumulate = math.lcm(config.accumulate, world)
    if config.batch % accumulate:
        raise ConsiliumError(
            f"train: --batch {config.batch} cannot be dealt into {accumulate} micro-batches over {world}"
            f" processes; give a multiple of {accumulate}."
        )
    return dataclasses.replace(config, accumulate=accumulate)


def _refuse_alone(config: Training) -> None:
    if isinstance(config.optimizer, AdamW) and isinstance(config.optimizer.state, BlockState):
        raise ConsiliumError(
            "train: optimizer.state.kind int8 runs in one process: its moments lie in blocks that cross rows,"
            " and over several processes which rows meet in a block would depend on how many there are; set"
            " it to float32, or train in one process."
        )
    if config.saving == "background":
        raise ConsiliumError(
            "train: saving background runs in one process: several save together, which they cannot while"
            " their steps exchange rows; set it to blocking, or train in one process."
        )


def _refuse_overlap(config: Training, mesh: Mesh) -> None:
    """Raise ConsiliumError where there is nothing to overlap, or no half to do it with."""
    moe = config.model.moe
    if moe is None or mesh.expert.size == 1:
        raise ConsiliumError(
            "train: overlap hides how rows travel to experts elsewhere, and all are here; give --ep, or set"
            " overlap to false."
        )
    if not moe.divisible:
        raise ConsiliumError(
            "train: overlap routes a micro-batch in two halves, and this router or its admission must see all"
            " tokens at once, or draws noise for them; set overlap to false."
        )
    rows = config.batch // math.lcm(config.accumulate, mesh.world.size)
    if rows < 2:
        raise ConsiliumError(
            f"train: overlap needs 2 sequences in a micro-batch to make halves of and there is {rows}; give"
            f" --batch {2 * math.lcm(config.accumulate, mesh.world.size)} or more."
        )


def agree(config: Training, corpus: Corpus, mesh: Mesh) -> None:
    """Raise ConsiliumError, in every process, where they would not train the same."""
    versions = f"torch: {torch.__version__}\nconsilium: {consilium.__version__}"
    mine = f"{io.to_yaml(config)}\ntext: {corpus.sha256}\n{versions}\nexperts over: {mesh.expert.size}"
    first, *others = mesh.world.texts(mine)
    for rank, other in enumerate(others, start=1):
        for here, there in zip(first.splitlines(), other.splitlines(), strict=False):
            if here != there:
                raise ConsiliumError(
                    f"the processes were not started alike: rank 0 has {here.strip()!r} and rank {rank}"
                    f" {there.strip()!r}; give all of them the same options and versions."
                )


def allocated(
    config: Model,
    mesh: Mesh,
    device: str = "cpu",
    *,
    generation: GenerationDefaults = GenerationDefaults(),
    overlap: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """A model of which this process has its part, still to be written."""
    blocks = partial(OverlappedBlock if overlap else Block, transports=over(mesh.expert))
    model = allocate(config, generation, dtype=dtype, device=device, blocks=blocks, share=1 / mesh.world.size)
    alone = [*model.layers, *(module.block for module in model.mtp), *model.mtp, model.embed]
    ends = [] if config.tied else [model.head]
    mesh.sharding.shard(model, (*alone, *ends), [moe.experts for moe in model.moe_modules().values()])
    return model


def drawn(config: Training, mesh: Mesh, device: str = "cpu") -> Decoder:
    """The model of the run's seed: the same weights as in one process."""
    model = allocated(config.model, mesh, device, overlap=config.overlap)
    initialise(model, config.model.init, config.seed, mesh.sharding.part)
    return model


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
    """Which rows of a tensor of optimizer state are this process's.

    One process has all, also of state that is kept in blocks and not in the rows of its weight.
    """
    if mesh.world.size == 1:
        return every_row
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
