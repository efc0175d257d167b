"""What the names of ``balances.TEXTS`` stand for: a configuration of balance for each MoE layer.

A method is a function of the layer, as some need to know how its experts lie on devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from consilium.config.balance import (
    SMEBU,
    AdaptiveLoss,
    Balance,
    BiasRule,
    CommunicationLoss,
    DeviceLoss,
    ImportanceLoss,
    LinearBias,
    LoadLoss,
    PIDBias,
    QuantileBias,
    SequenceLoss,
    SignBias,
    SwitchLoss,
    ZLoss,
)
from consilium.config.moe import MoE
from consilium.config.router import TopK
from consilium.errors import ConsiliumError

Make = Callable[[MoE], Balance]

_DEVICES = 8
"""As many as DeepSeek-V2 trains on, where the router does not say how many it is limited to."""


def _by_bias(rule: BiasRule) -> Make:
    return lambda _: Balance(bias=rule)


def _by_losses(*losses: Any) -> Make:
    return lambda _: Balance(losses=losses)


def _by_bias_and_loss(rule: BiasRule) -> Make:
    """A bias, and the small sequence loss of DeepSeek-V3 beside it."""
    return lambda _: Balance(losses=(SequenceLoss(),), bias=rule)


def _by_device(moe: MoE) -> Balance:
    return Balance(losses=(SwitchLoss(coefficient=3e-3), DeviceLoss(devices=_devices(moe)[0])))


def _by_traffic(moe: MoE) -> Balance:
    devices, most = _devices(moe)
    return Balance(
        losses=(
            SequenceLoss(coefficient=3e-3),
            DeviceLoss(devices=devices, scope="sequence"),
            CommunicationLoss(devices=devices, most=most),
        )
    )


def _devices(moe: MoE) -> tuple[int, int]:
    """How many hold the experts, and how many a token may reach."""
    if isinstance(moe.router.select, TopK) and moe.router.select.groups is not None:
        return moe.router.select.groups.count, moe.router.select.groups.keep
    devices = math.gcd(moe.experts, _DEVICES)
    if devices == 1:
        raise ConsiliumError(
            f"--balance: {moe.experts} experts are not divisible among devices; choose a balance of experts."
        )
    return devices, min(devices, moe.most_active)


BALANCES: Mapping[str, Make] = MappingProxyType(
    {
        "none": _by_losses(),
        "switch": _by_losses(SwitchLoss()),
        "switch-z": _by_losses(SwitchLoss(), ZLoss()),
        "global": _by_losses(SwitchLoss(scope="global")),
        "step": _by_losses(SwitchLoss(scope="step")),
        "sequence": _by_losses(SequenceLoss(coefficient=1e-2)),
        "device": _by_device,
        "communication": _by_traffic,
        "importance": _by_losses(ImportanceLoss()),
        "load": _by_losses(ImportanceLoss(), LoadLoss()),
        "adaptive": _by_losses(AdaptiveLoss()),
        "bias": _by_bias_and_loss(SignBias()),
        "bias-centred": _by_bias(SignBias(centred=True)),
        "bias-linear": _by_bias_and_loss(LinearBias()),
        "smebu": _by_bias(SMEBU()),
        "pid": _by_bias(PIDBias()),
        "quantile": _by_bias(QuantileBias()),
        "quantile-ema": _by_bias(QuantileBias(momentum=0.5)),
        "quantile-histogram": _by_bias(QuantileBias(statistics="histogram")),
        "sinkhorn": _by_losses(),
    }
)
