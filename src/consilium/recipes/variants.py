"""Variations of a configuration that people ask for by name: a balance method, a dense twin.

The dense twin answers "what would the same compute buy without experts?".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

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
from consilium.config.moe import Capacity, Dropless
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
    """Return ``model`` balanced by the method called ``name``, with what the method needs.

    A bias needs an offset, and the adaptive loss drops: a dropless model gets skywork-moe's capacity.
    Raises ConsiliumError for unknown names and for methods that the router cannot have.
    """
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
    adaptive = any(isinstance(loss, AdaptiveLoss) for loss in balance.losses)
    lacking = adaptive and isinstance(model.moe.admission, Dropless)
    admission = Capacity(factor=1.25) if lacking else model.moe.admission
    moe = changed(model.moe, where=where, router=router, admission=admission, balance=balance)
    return dataclasses.replace(model, moe=moe)


def dense_twin(model: Model) -> Model:
    """A dense model of the same active parameters: every block gets the mean of what blocks use.

    Router and latent projections count. All else is unchanged, multi-token prediction included.
    """
    moe = model.moe
    if moe is None:
        return model
    # In vectors as long as the hidden size, of which a network has its width times its matrices.
    experts = moe.active_experts * moe.width * moe.expert_size(model.hidden_size) / model.hidden_size
    around = moe.router.gate_rows(moe.experts) + 2 * (moe.latent or 0)
    sparse = moe.matrices * (experts + moe.shared_width) + around
    dense = model.dense.matrices * model.dense.width if model.dense else 0
    routed = sum(model.is_moe(i) for i in range(model.layers)) / model.layers
    width = (routed * sparse + (1 - routed) * dense) / moe.matrices
    return dataclasses.replace(
        model,
        moe=None,
        dense=FeedForward(width=max(8, round(width / 8) * 8), activation=moe.activation),
        dense_first=0,
        moe_every=1,
    )
