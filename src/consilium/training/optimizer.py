"""AdamW in two groups: matrices decay, vectors (norms, biases) do not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from consilium.config.training import AdamW


def build_optimizer(model: nn.Module, config: AdamW) -> torch.optim.AdamW:
    """Float32 moments for every parameter that trains.

    Idle experts have zero gradients, so they decay like all others.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decaying = [p for p in trained if p.ndim >= 2]
    plain = [p for p in trained if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decaying, "weight_decay": config.decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def moments(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by parameter name; empty before the first step."""
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state.update({f"{name}:{key}": value for key, value in optimizer.state.get(parameter, {}).items()})
    return state


def restore_moments(optimizer: torch.optim.AdamW, model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Inverse of ``moments``."""
    parameters = dict(model.named_parameters())
    for key, value in saved.items():
        name, _, field = key.rpartition(":")
        optimizer.state[parameters[name]][field] = value.to(parameters[name].device, copy=True)
