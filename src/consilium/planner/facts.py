"""Facts of a model in the words and numbers of lists and pages."""

from __future__ import annotations

from typing import Final

from consilium.config.moe import AlwaysOn, MoE, NoShared, SigmoidGated

BF16_BYTES: Final = 2


def shared_experts(moe: MoE | None) -> int:
    """Networks that every token uses beside the routed experts."""
    if moe is None:
        return 0
    match moe.shared:
        case NoShared():
            return 0
        case AlwaysOn(count=count):
            return count
        case SigmoidGated():
            return 1


def causality(moe: MoE | None) -> str:
    """``yes``, ``no``, or ``not in training`` where a capacity lets later tokens displace earlier ones."""
    if moe is None or (moe.causal and moe.causal_in_training):
        return "yes"
    return "not in training" if moe.causal else "no"


def shape_text(shape: tuple[int, ...]) -> str:
    """``[512, 1024]``."""
    return f"[{', '.join(map(str, shape))}]"
