"""Bytes of weights and of training state."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from consilium.records.plan import Parameters

BITS: Mapping[str, int] = MappingProxyType({"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4})
"""Bits a weight. The scales that int8 and int4 need come on top."""

TRAINING_BYTES = 4 + 4 + 4 + 4
"""float32 weight, gradient, first and second moment of AdamW."""


def weight_bytes(parameters: Parameters, dtype: str) -> int:
    """Bytes of the main model's weights in ``dtype``, rounded up; scales and buffers not counted."""
    return -(-parameters.total * BITS[dtype] // 8)


def training_bytes(parameters: Parameters) -> int:
    """Bytes of weights, gradients and optimizer state in float32, MTP included; activations not counted."""
    return TRAINING_BYTES * (parameters.total + parameters.mtp)
