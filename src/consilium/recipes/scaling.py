"""A model with all widths and the depth scaled: the one dial of ``consilium train --params``."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA, MLA
from consilium.config.model import Model
from consilium.config.moe import AlwaysOn, MoE, SigmoidGated


def scaled(model: Model, factor: float) -> Model:
    """Return ``model`` with widths times ``factor`` and depth times its root; experts and k stay.

    At least one layer routes where one did.
    """

    def width(value: int, multiple: int = 8) -> int:
        return max(multiple, round(value * factor / multiple) * multiple)

    hidden = width(model.hidden_size, 16)
    return dataclasses.replace(
        model,
        hidden_size=hidden,
        layers=max(model.dense_first + model.moe_every, round(model.layers * factor**0.5)),
        attention=_scaled_attention(model.attention, factor),
        dense=model.dense and dataclasses.replace(model.dense, width=width(model.dense.width)),
        moe=model.moe and _scaled_moe(model.moe, factor),
    )


def _scaled_attention(attention: GQA | MLA, factor: float) -> GQA | MLA:
    match attention:
        case GQA(heads=heads, kv_heads=kv_heads):
            groups = max(1, round(kv_heads * factor))
            return dataclasses.replace(attention, heads=groups * (heads // kv_heads), kv_heads=groups)
        case MLA(heads=heads, q_rank=q_rank, kv_rank=kv_rank):
            return dataclasses.replace(
                attention,
                heads=max(1, round(heads * factor)),
                q_rank=q_rank and max(16, round(q_rank * factor / 8) * 8),
                kv_rank=max(16, round(kv_rank * factor / 8) * 8),
            )


def _scaled_moe(moe: MoE, factor: float) -> MoE:
    def width(value: int) -> int:
        return max(8, round(value * factor / 8) * 8)

    shared = moe.shared
    if isinstance(shared, AlwaysOn | SigmoidGated):
        shared = dataclasses.replace(shared, width=width(shared.width))
    latent = moe.latent and width(moe.latent)
    return dataclasses.replace(moe, width=width(moe.width), latent=latent, shared=shared)
