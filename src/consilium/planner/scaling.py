"""One dial: a recipe with all widths and the depth scaled to a number of parameters (``--params``)."""

from __future__ import annotations

import dataclasses

from consilium.config.attention import GQA, MLA
from consilium.config.model import Model
from consilium.config.moe import AlwaysOn, MoE, SigmoidGated
from consilium.errors import ConsiliumError
from consilium.planner.parameters import parameters

TOLERANCE = 0.25


def scale_to(model: Model, wanted: int) -> Model:
    """Return ``model`` scaled so that its total is as near to ``wanted`` parameters as whole widths allow.

    Raises ConsiliumError when even the nearest is more than a quarter off, as with a vocabulary that alone is
    larger.
    """
    low, high = 0.02, 64.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if _total(scaled(model, middle)) < wanted else (low, middle)
    best = min((scaled(model, low), scaled(model, high)), key=lambda m: abs(_total(m) - wanted))
    if abs(_total(best) - wanted) > TOLERANCE * wanted:
        raise ConsiliumError(
            f"--params {wanted:,}: {model.family} comes no nearer than {_total(best):,} parameters;"
            " choose another size or recipe."
        )
    return best


def scaled(model: Model, factor: float) -> Model:
    """Return ``model`` with widths times ``factor`` and depth times its root; experts and k stay.

    At least one layer routes where one did.
    """

    def width(value: int, multiple: int = 8) -> int:
        return max(multiple, round(value * factor / multiple) * multiple)

    hidden = width(model.hidden_size, 16)
    layers = max(model.dense_first + model.moe_every, round(model.layers * factor**0.5))
    return dataclasses.replace(
        model,
        hidden_size=hidden,
        layers=layers,
        attention=_scaled_attention(model.attention, factor, layers),
        dense=model.dense and dataclasses.replace(model.dense, width=width(model.dense.width)),
        moe=model.moe and _scaled_moe(model.moe, factor),
    )


def _scaled_attention(attention: GQA | MLA, factor: float, layers: int) -> GQA | MLA:
    match attention:
        case GQA(heads=heads, kv_heads=kv_heads, full_layers=full):
            groups = max(1, round(kv_heads * factor))
            return dataclasses.replace(
                attention,
                heads=groups * (heads // kv_heads),
                kv_heads=groups,
                full_layers=tuple(layer for layer in full if layer < layers),
            )
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


def _total(model: Model) -> int:
    counts = parameters(model)
    return counts.total + counts.mtp
