"""Variations of a configuration that people ask for by name: a balance method, a dense twin, another size.

The dense twin answers "what would the same compute buy without experts?"; ``scaled`` is the one dial of
``consilium train --params``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from consilium.config.attention import GQA, MLA
from consilium.config.balance import (
    AdaptiveLoss,
    Balance,
    LinearBias,
    NoBias,
    SequenceLoss,
    SignBias,
    SwitchLoss,
    ZLoss,
)
from consilium.config.feed_forward import FeedForward
from consilium.config.io import changed
from consilium.config.model import Model
from consilium.config.moe import AlwaysOn, MoE, SigmoidGated
from consilium.errors import ConsiliumError, nearest

BALANCES: Mapping[str, Balance] = MappingProxyType(
    {
        "none": Balance(),
        "switch": Balance(losses=(SwitchLoss(),)),
        "sequence": Balance(losses=(SequenceLoss(coefficient=1e-2),)),
        "bias": Balance(losses=(SequenceLoss(),), bias=SignBias()),
        "bias-linear": Balance(losses=(SequenceLoss(),), bias=LinearBias()),
        "adaptive": Balance(losses=(AdaptiveLoss(),)),
        "switch-z": Balance(losses=(SwitchLoss(), ZLoss())),
    }
)


def with_balance(model: Model, name: str) -> Model:
    """Return ``model`` balanced by the method called ``name``. Raises ConsiliumError for unknown names."""
    if name not in BALANCES:
        raise ConsiliumError(f"unknown balance {name!r}.{nearest(name, BALANCES)}")
    if model.moe is None:
        raise ConsiliumError(
            f"--balance {name}: {model.family} is dense and has nothing to balance; drop the option."
        )
    balance = BALANCES[name]
    # An offset that the system has stays: without a rule its bias is zero and the layout is the same.
    reads = model.moe.router.offset != "none" or isinstance(balance.bias, NoBias)
    offset, where = model.moe.router.offset if reads else "scores", f"--balance {name}"
    router = changed(model.moe.router, where=where, offset=offset)
    return dataclasses.replace(model, moe=changed(model.moe, where=where, router=router, balance=balance))


def dense_twin(model: Model) -> Model:
    """A dense model of the same active parameters: every block gets the mean active feed-forward width.

    A latent space counts with its projections. All else is unchanged, multi-token prediction included.
    """
    moe = model.moe
    if moe is None:
        return model
    routed = sum(model.is_moe(i) for i in range(model.layers))
    dense = model.dense or FeedForward(width=1, activation=moe.activation)
    size = moe.expert_size(model.hidden_size)
    around = 2 * (moe.latent or 0) / FeedForward(width=1, activation=moe.activation).matrices
    active = moe.most_active * moe.width * size / model.hidden_size + around + moe.shared_width
    width = (routed * active + (model.layers - routed) * dense.width) / model.layers
    return dataclasses.replace(
        model,
        moe=None,
        dense=FeedForward(width=max(8, round(width / 8) * 8), activation=moe.activation),
        dense_first=0,
    )


def scaled(model: Model, factor: float) -> Model:
    """Return ``model`` with widths times ``factor`` and depth times its root; experts and k stay."""

    def width(value: int, multiple: int = 8) -> int:
        return max(multiple, round(value * factor / multiple) * multiple)

    hidden = width(model.hidden_size, 16)
    return dataclasses.replace(
        model,
        hidden_size=hidden,
        layers=max(model.dense_first + 1, round(model.layers * factor**0.5)),
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
