"""The training objective of one micro-batch: next token, tokens further ahead, and balance.

Legend: B rows, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.data.batch import Batch
from consilium.model.decoder import Decoder
from consilium.model.types import Inputs, Losses, Objective, Options
from consilium.moe.types import Report


@dataclass(frozen=True, slots=True)
class Share:
    """What part of an optimizer step a micro-batch is, so that gradients of micro-batches simply add up."""

    targets: int
    """Predicted tokens of the whole step."""
    micro_batches: int


@dataclass(frozen=True, slots=True)
class Loss:
    """``total`` carries the gradient; the rest is what it was made of. All float32 scalars, in nats."""

    total: Tensor
    nll: Tensor
    """Summed over the micro-batch's targets."""
    ahead: Tensor
    """Weighted multi-token prediction loss, as it enters ``total``."""
    balance: Mapping[str, Tensor]
    """Summed over layers, as each enters ``total``."""
    reports: Mapping[int, Report]
    """By index of the MoE layer."""
    largest: Mapping[int, Tensor]
    """Largest logits of each head by index of the block; empty unless the options ask for them."""


def training_loss(model: Decoder, batch: Batch, share: Share, *, options: Options) -> Loss:
    """Mean negative log-likelihood over the step's targets plus balance losses averaged over micro-batches.

    Multi-token prediction adds weight / depth times its summed losses over the same number of targets
    (DeepSeek-V3 eq. 24 and 25). The model is asked through ``forward`` alone.
    """
    losses: Losses = model(Inputs.of(batch), options=options, objective=Objective(batch.targets_BS))
    targets = max(share.targets, 1)
    weight = model.config.mtp.weight / max(len(losses.ahead), 1)
    ahead = sum((nll * (weight / targets) for nll in losses.ahead), start=losses.nll.new_zeros(()))
    balance = _sum_by_name(losses.reports, share.micro_batches)
    total = losses.nll / targets + ahead + sum(balance.values(), start=losses.nll.new_zeros(()))
    parts = {name: value.detach() for name, value in balance.items()}
    return Loss(total, losses.nll.detach(), ahead.detach(), parts, losses.reports, losses.largest)


def _sum_by_name(reports: Mapping[int, Report], micro_batches: int) -> dict[str, Tensor]:
    names = {name for report in reports.values() for name in report.losses}
    return {
        name: torch.stack([r.losses[name] for r in reports.values() if name in r.losses]).sum()
        / micro_batches
        for name in sorted(names)
    }
