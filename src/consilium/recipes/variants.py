"""Variations of a configuration that people ask for by name: a balance method, a dense twin.

The dense twin answers "what would the same compute buy without experts?".
"""

from __future__ import annotations

import dataclasses
from typing import Any

from consilium.config.balance import AdaptiveLoss, Balance, LoadLoss, NoBias
from consilium.config.feed_forward import FeedForward
from consilium.config.io import changed
from consilium.config.model import Model
from consilium.config.moe import Admission, Capacity, Dropless, MoE
from consilium.config.router import LearnedNoise, NoNoise, Router, Sinkhorn, TopK
from consilium.errors import ConsiliumError, nearest
from consilium.recipes.balancing import BALANCES


def with_balance(model: Model, name: str) -> Model:
    """Return ``model`` balanced by the method called ``name``, with what the method needs.

    A bias needs an offset, Sinkhorn a selector of its own and none, the load loss learned noise; the adaptive
    loss drops, so a dropless model gets skywork-moe's capacity.
    Raises ConsiliumError for unknown names and for methods that the router cannot have.
    """
    if name not in BALANCES:
        raise ConsiliumError(f"unknown balance {name!r}.{nearest(name, BALANCES)}")
    if model.moe is None:
        raise ConsiliumError(
            f"--balance {name}: {model.family} is dense and has nothing to balance; drop the option."
        )
    where, balance = f"--balance {name}", BALANCES[name](model.moe)
    router = changed(model.moe.router, where=where, **_router(model.moe.router, name, balance))
    moe = changed(
        model.moe, where=where, router=router, admission=_admission(model.moe, balance), balance=balance
    )
    return dataclasses.replace(model, moe=moe)


def _router(router: Router, name: str, balance: Balance) -> dict[str, Any]:
    """What changes of the router."""
    select = router.served.select
    if name == "sinkhorn":
        if not isinstance(select, TopK) or select.groups is not None:
            raise ConsiliumError(
                "--balance sinkhorn: its plan chooses the best k of all experts, and moe.router.select is"
                f" {_described(router)}; choose another balance."
            )
        return {"select": Sinkhorn(k=select.k), "offset": "none"}
    if any(isinstance(loss, LoadLoss) for loss in balance.losses):
        noise = LearnedNoise() if isinstance(router.noise, NoNoise) else router.noise
        return {"select": select, "offset": "none", "noise": noise}
    # An offset that the system has stays: without a rule its bias is zero and the layout is the same.
    reads = router.offset != "none" or isinstance(balance.bias, NoBias)
    return {"select": select, "offset": router.offset if reads else "scores"}


def _described(router: Router) -> str:
    return f"{router.select.kind!r}{' with groups' if isinstance(router.select, TopK) else ''}"


def _admission(moe: MoE, balance: Balance) -> Admission:
    adaptive = any(isinstance(loss, AdaptiveLoss) for loss in balance.losses)
    lacking = adaptive and isinstance(moe.admission, Dropless)
    return Capacity(factor=1.25) if lacking else moe.admission


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
