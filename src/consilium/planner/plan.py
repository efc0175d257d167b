"""One call from a configuration to its costs."""

from __future__ import annotations

from consilium.config.model import Model
from consilium.planner.flops import flops
from consilium.planner.kv import values_per_token, windowed
from consilium.planner.memory import BITS, training_bytes, weight_bytes
from consilium.planner.parameters import parameters
from consilium.records.plan import Plan

_BF16_BYTES = 2


def plan(model: Model) -> Plan:
    """Return exact parameters, and FLOPs and memory by the conventions of their modules."""
    counts = parameters(model)
    values = values_per_token(model)
    by_dtype = {dtype: weight_bytes(counts, dtype) for dtype in BITS}
    return Plan(
        family=model.family,
        parameters=counts,
        flops_per_token=flops(model),
        kv_values_per_token=values,
        kv_bytes_per_token=_BF16_BYTES * values,
        weight_bytes=by_dtype["bfloat16"],
        weight_bytes_by_dtype=by_dtype,
        training_bytes=training_bytes(counts),
        window=windowed(model),
    )
