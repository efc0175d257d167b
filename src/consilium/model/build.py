"""Configuration to modules: the one place that builds a model."""

from __future__ import annotations

from functools import partial

import torch

from consilium.config.generation import GenerationDefaults
from consilium.config.model import Model
from consilium.errors import ConsiliumError, nearest
from consilium.machine.allocator import huge
from consilium.machine.memory import refuse_beyond_memory
from consilium.model.block import Block, Blocks
from consilium.model.decoder import Decoder
from consilium.model.init import initialise
from consilium.moe.transport import Transports, local
from consilium.planner.parameters import parameters

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype called ``name``. Raises ConsiliumError for unknown names."""
    if name not in DTYPES:
        raise ConsiliumError(f"unknown dtype {name!r}.{nearest(name, DTYPES)}")
    return DTYPES[name]


def build(
    config: Model,
    *,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    transports: Transports = local,
) -> Decoder:
    """Build a freshly initialised model; on ``device="meta"`` it has shapes and no memory.

    A seed means the same model on every device, and torch's own generators stay where they are. Router
    arithmetic and balance state stay float32 whatever ``dtype``. ``transports`` says by layer how rows reach
    their experts. Raises ConsiliumError for a model that this machine cannot hold.
    """
    blocks = partial(Block, transports=transports)
    model = allocate(config, dtype=torch_dtype(dtype), device=device, blocks=blocks)
    if device != "meta":
        initialise(model, config.init, seed)
    return model


def allocate(
    config: Model,
    generation: GenerationDefaults = GenerationDefaults(),
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    blocks: Blocks = Block,
    share: float = 1.0,
) -> Decoder:
    """A model whose parameters are still to be written: nothing is drawn and no memory of theirs is touched.

    ``share`` of their bytes will be here, where processes share them or weights are packed. Raises
    ConsiliumError for a part that this machine cannot hold.
    """
    if device == "meta":
        with torch.device("meta"):
            return Decoder(config, generation, blocks=blocks).to(dtype)
    if device == "cpu":
        refuse_too_large(config, dtype, share)
    model = Decoder(config, generation, blocks=blocks)
    for parameter in model.parameters():
        parameter.data = huge(torch.empty_like(parameter, dtype=dtype, device=device))
    return model.to(device)


def refuse_too_large(config: Model, dtype: torch.dtype, share: float = 1.0) -> None:
    """Raise ConsiliumError where this ``share`` of ``config`` in ``dtype`` is more than memory and swap."""
    counts = parameters(config)
    values = counts.total + counts.mtp
    refuse_beyond_memory(
        int(values * dtype.itemsize * share),
        f"{config.family} with {values:,} parameters in {str(dtype).removeprefix('torch.')}",
        "choose a smaller size or dtype, or ask 'consilium plan' what fits",
    )
