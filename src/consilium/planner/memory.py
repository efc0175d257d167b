"""Bytes of weights and of training state."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from consilium.config.attention import GQA, MLA, Attention
from consilium.config.model import Model
from consilium.errors import ConsiliumError
from consilium.planner.kv import values_per_token
from consilium.planner.parameters import parameters
from consilium.records.plan import Parameters, Serving

BITS: Mapping[str, int] = MappingProxyType({"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4})
"""Bits a weight. The scales that int8 and int4 need come on top."""

FLOAT32: Final = 4
MOMENTS: Final = 2 * FLOAT32
"""Bytes a value of the first and the second moment of AdamW."""

TRAINING_BYTES: Final = 2 * FLOAT32 + MOMENTS
"""float32 weight and gradient, first and second moment of AdamW."""


def weight_bytes(parameters: Parameters, dtype: str) -> int:
    """Bytes of the main model's weights in ``dtype``, rounded up; scales and buffers not counted."""
    return -(-parameters.total * BITS[dtype] // 8)


def training_bytes(parameters: Parameters) -> int:
    """Bytes of weights, gradients and AdamW's state in float32, MTP included; activations not counted."""
    return TRAINING_BYTES * (parameters.total + parameters.mtp)


def serving(model: Model, *, context: int | None = None, batch: int = 1, dtype: str = "bfloat16") -> Serving:
    """Bytes that ``batch`` sequences of ``context`` tokens take: weights, their cache and one pass over them.

    ``context`` is by default the model's length. Weights are in ``dtype``; cache and activations too, or in
    bfloat16 where ``dtype`` is one of weights alone. Raises ConsiliumError beyond the model's length.
    """
    length = model.max_length if context is None else context
    if length > model.max_length:
        raise ConsiliumError(
            f"plan: a context of {length:,} exceeds the model's length of {model.max_length:,};"
            " lower --context."
        )
    size = max(BITS[dtype], 16) // 8
    tokens = batch * length
    logits = 4 * batch * model.vocab_size
    return Serving(
        context=length,
        batch=batch,
        dtype=dtype,
        weight_bytes=weight_bytes(parameters(model), dtype),
        cache_bytes=size * tokens * values_per_token(model),
        activation_bytes=size * tokens * activations(model) + logits,
    )


def activations(model: Model) -> int:
    """Values a token that are alive at once at the peak of a pass that keeps nothing for gradients.

    The residual stream and its norm, and the widest stage of a layer: queries, keys, values and output of
    attention, whose scores are never whole; or the rows of the chosen experts, from their gather to their
    outputs. Logits are the last token's, in float32, and not in this count.
    """
    stages = [_attention(model.attention, model.hidden_size)]
    if model.dense is not None:
        stages.append(model.dense.matrices * model.dense.width + model.hidden_size)
    if model.moe is not None:
        rows, inside = model.moe.most_active, model.moe.expert_size(model.hidden_size)
        stages.append(rows * (2 * inside + model.moe.matrices * model.moe.width) + model.hidden_size)
    return 2 * model.hidden_size + max(stages)


def _attention(config: Attention, hidden: int) -> int:
    """MLA is counted expanded, as it reads a prompt."""
    match config:
        case GQA(heads=heads, kv_heads=kv_heads, head_dim=width):
            return (2 * heads + 2 * kv_heads) * width + hidden
        case MLA(heads=heads, q_rank=q_rank, kv_rank=kv_rank, nope_dim=nope, rope_dim=rope, v_dim=value):
            return (q_rank or 0) + kv_rank + rope + 2 * heads * (nope + rope + value) + hidden
