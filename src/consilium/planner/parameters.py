"""Exact parameter counts of a configuration: sums over the shapes of its tensors, without building it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import final

from consilium.config.balance import AdaptiveLoss, NoBias
from consilium.config.model import Model
from consilium.planner.shapes import Shapes, block, ends, prediction
from consilium.records.plan import Parameters


@final
@dataclass(frozen=True, slots=True)
class Count:
    """Values of a part: all, those that one token uses, and those of matrices that it multiplies with."""

    total: int = 0
    active: int = 0
    matrices: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.total + other.total, self.active + other.active, self.matrices + other.matrices)


def parameters(model: Model) -> Parameters:
    """Count the parameters of ``model``; equals the built model to the last unit."""
    main, extra = decoder(model), mtp(model)
    embedding = 0 if model.tied else model.vocab_size * model.hidden_size
    return Parameters(
        total=main.total,
        active=main.active,
        active_without_input_embedding=main.active - embedding,
        mtp=extra.total,
        buffers=_buffers(model),
    )


def decoder(model: Model) -> Count:
    """Embedding, blocks, norm and head. A tied matrix is stored once and multiplied once, as the head."""
    both = _sum(model, ends(model))
    embedding = 0 if model.tied else model.vocab_size * model.hidden_size
    blocks = (_sum(model, block(model, layer)) for layer in range(model.layers))
    return sum(blocks, both + Count(matrices=-embedding))


def mtp(model: Model) -> Count:
    """Multi-token prediction modules; embedding and head are the main model's (2412.19437 section 2.2)."""
    return sum((_sum(model, prediction(model, module)) for module in range(model.mtp.depth)), Count())


def _sum(model: Model, tensors: Shapes) -> Count:
    """Of routed experts, those that a token uses on average count as active."""
    sizes = {name: (math.prod(shape), len(shape) > 1) for name, shape in tensors}
    experts = sum(size for name, (size, _) in sizes.items() if ".experts." in f".{name}")
    idle = 0
    if model.moe is not None and experts:
        idle = experts - round(model.moe.active_experts * (experts // model.moe.experts))
    total = sum(size for size, _ in sizes.values())
    return Count(total, total - idle, sum(size for size, matrix in sizes.values() if matrix) - idle)


def _buffers(model: Model) -> int:
    """Saved control state of the decoder without MTP: a bias an expert, a coefficient an adaptive loss."""
    if model.moe is None:
        return 0
    balance = model.moe.balance
    biased = not isinstance(balance.bias, NoBias) or model.moe.router.offset != "none"
    layer = model.moe.experts * biased + any(isinstance(loss, AdaptiveLoss) for loss in balance.losses)
    return layer * len(dataclasses.replace(model, mtp=dataclasses.replace(model.mtp, depth=0)).moe_layers)
