"""``consilium plan --against``: two models side by side."""

from __future__ import annotations

import dataclasses

from consilium.planner.compare import compare
from consilium.records.plan import Plan
from consilium.report.plain import columns
from consilium.words.say import say


def comparison_data(plan: Plan, other: Plan) -> dict[str, object]:
    """The other model's plan, and the ratios of this one to it."""
    return {**dataclasses.asdict(other), "ratio": dataclasses.asdict(compare(plan, other))}


def comparison_text(name: str, plan: Plan, other_name: str, other: Plan) -> str:
    """Two models in two columns, and how much the first saves."""
    ratio = compare(plan, other)
    rows = [
        ("", name, other_name, say("saved")),
        _row(say("parameters"), plan.parameters.total, other.parameters.total, ratio.total),
        _row(say("active a token"), plan.parameters.active, other.parameters.active, ratio.active),
        _row(
            say("forward operations a token"),
            plan.flops_per_token.forward,
            other.flops_per_token.forward,
            ratio.forward,
        ),
        _row(
            say("cached values a token"), plan.kv_values_per_token, other.kv_values_per_token, ratio.kv_values
        ),
    ]
    for bits, share in ratio.kv_bytes_by_bits.items():
        ours, theirs = plan.kv_values_per_token * int(bits), other.kv_values_per_token * 16
        label = say("cached bits a token, {bits} against 16 a value", bits=bits)
        rows.append(_row(label, ours, theirs, share))
    return f"\n{say('side by side')}\n" + columns(rows, right=range(1, 4), indent="  ")


def _row(label: str, ours: int, theirs: int, ratio: float) -> tuple[str, str, str, str]:
    return label, f"{ours:,}", f"{theirs:,}", f"{100 * (1 - ratio):.1f} %"
