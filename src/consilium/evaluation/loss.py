"""The training objective of one micro-batch: next token, tokens further ahead, and balance.

Legend: B rows, S tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.data.batch import Batch
from consilium.model.decoder import Decoder
from consilium.model.mtp import shift, shifted
from consilium.model.types import Inputs, Options
from consilium.moe.types import Report

IGNORE = -1


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
    reports: tuple[Report, ...]


def inputs_of(batch: Batch) -> Inputs:
    return Inputs(batch.ids_BS, batch.sequence_BS, batch.position_BS, batch.valid_BS)


def training_loss(model: Decoder, batch: Batch, share: Share, *, options: Options) -> Loss:
    """Mean negative log-likelihood over the step's targets plus balance losses averaged over micro-batches.

    Multi-token prediction adds weight / depth times its summed losses over the same number of targets
    (DeepSeek-V3 eq. 24 and 25).
    """
    inputs = inputs_of(batch)
    hidden = model.hidden(inputs, options=options)
    nll, _ = model.nll(hidden.final_BSD, batch.targets_BS)
    ahead, ahead_reports = _ahead(model, hidden.final_BSD, batch, share, options)
    reports = hidden.reports + ahead_reports
    balance = _sum_by_name(reports, share.micro_batches)
    total = nll / max(share.targets, 1) + ahead + sum(balance.values(), start=nll.new_zeros(()))
    return Loss(total, nll.detach(), ahead.detach(), {k: v.detach() for k, v in balance.items()}, reports)


def _ahead(
    model: Decoder, hidden_BSD: Tensor, batch: Batch, share: Share, options: Options
) -> tuple[Tensor, tuple[Report, ...]]:
    total = hidden_BSD.new_zeros((), dtype=torch.float32)
    inputs = inputs_of(batch)
    outputs = model.predict_ahead(hidden_BSD, inputs, options=options)
    for k, output in enumerate(outputs):
        valid_BS = shifted(inputs, k + 1).valid_BS
        assert valid_BS is not None
        targets_BS = shift(batch.targets_BS, k + 1, IGNORE).masked_fill(~valid_BS, IGNORE)
        nll, _ = model.nll(output.final_BSD, targets_BS)
        total = total + nll * (model.config.mtp.weight / len(outputs) / max(share.targets, 1))
    return total, tuple(report for output in outputs for report in output.reports)


def _sum_by_name(reports: tuple[Report, ...], micro_batches: int) -> dict[str, Tensor]:
    names = {name for report in reports for name in report.losses}
    return {
        name: torch.stack([r.losses[name] for r in reports if name in r.losses]).sum() / micro_batches
        for name in sorted(names)
    }
