"""Two models side by side: what one needs of what the other needs."""

from __future__ import annotations

from consilium.records.plan import Comparison, Plan

KV_BITS = (16, 8, 6, 4)
"""Bits a cached value; 6 is what DeepSeek-V2 reports on average when it is served (2405.04434)."""


def compare(plan: Plan, other: Plan) -> Comparison:
    """Ratios of ``plan`` to ``other``. The other's cache stays at 16 bits a value."""
    return Comparison(
        total=plan.parameters.total / other.parameters.total,
        active=plan.parameters.active / other.parameters.active,
        forward=plan.flops_per_token.forward / other.flops_per_token.forward,
        kv_values=plan.kv_values_per_token / other.kv_values_per_token,
        kv_bytes_by_bits={str(bits): kv_ratio(plan, other, bits) for bits in KV_BITS},
    )


def kv_ratio(plan: Plan, other: Plan, bits: int, other_bits: int = 16) -> float:
    """Cached bits a token of one over those of the other; the scales that low precisions need left out."""
    return plan.kv_values_per_token * bits / (other.kv_values_per_token * other_bits)
