"""One optimizer step: micro-batches forward and backward, guard, update, balance.

Legend: E routed experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.config.training import Training
from consilium.data.batch import Batch
from consilium.data.loader import Loader
from consilium.evaluation.loads import ExpertLoad, LoadCounter
from consilium.model.build import torch_dtype
from consilium.model.decoder import Decoder
from consilium.model.types import Options
from consilium.moe.types import Mode
from consilium.training import guard
from consilium.training.freeze import balancing_layers
from consilium.training.objective import Loss, Share, training_loss
from consilium.training.optimizer import Optimizer, set_rate
from consilium.training.schedule import learning_rate


@dataclass(frozen=True, slots=True)
class StepResult:
    loss: float
    ce: float
    """Nats a predicted token."""
    ahead: float
    balance: dict[str, float]
    norm: float
    """Gradient norm before clipping."""
    rate: float
    tokens: int
    loads: Mapping[int, ExpertLoad]
    """By index of the MoE layer."""
    skipped: bool


def train_step(
    model: Decoder, optimizer: Optimizer, loader: Loader, config: Training, step: int
) -> StepResult:
    """Run step ``step`` (from 0): a pure function of weights, optimizer state, configuration and step.

    A non-finite loss or gradient norm leaves weights, moments and balance state untouched.
    """
    result = gradients(model, optimizer, loader, config, step)
    if not result.skipped:
        update(model, optimizer, config, result)
    return result


def gradients(
    model: Decoder, optimizer: Optimizer, loader: Loader, config: Training, step: int
) -> StepResult:
    """Everything of a step up to its gradients, which are clipped: no weight has moved yet."""
    optimizer.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    batch = [loader.micro(step, i, config.accumulate).to(device) for i in range(config.accumulate)]
    share = Share(sum(int((b.targets_BS >= 0).sum()) for b in batch), config.accumulate)
    documents = _documents(model, batch)
    losses: list[Loss] = []
    loads = LoadCounter()
    for i, micro in enumerate(batch):
        options = _options(config, step, i, loads.wanted, documents)
        losses.append(training_loss(model, micro, share, options=options))
        losses[-1].total.backward()
        loads.add(losses[-1].reports.values())
    norm = guard.clip(model, config.optimizer.clip)
    rate = learning_rate(config.schedule, config.optimizer.learning_rate, step, config.steps)
    total = sum(float(loss.total.detach()) for loss in losses)
    return StepResult(
        loss=total,
        ce=sum(float(loss.nll) for loss in losses) / max(share.targets, 1),
        ahead=sum(float(loss.ahead) for loss in losses),
        balance={name: sum(float(loss.balance[name]) for loss in losses) for name in losses[0].balance},
        norm=norm,
        rate=rate,
        tokens=sum(int(b.valid_BS.sum()) for b in batch),
        loads=loads.result(),
        skipped=not guard.is_healthy(total, norm),
    )


def update(model: Decoder, optimizer: Optimizer, config: Training, result: StepResult) -> None:
    """Move the weights by their gradients, then the balance by what the routers wanted.

    Loads after drops would tell a full expert from an overfull one no longer (2408.15664 counts assignments).
    """
    set_rate(optimizer, result.rate)
    optimizer.step()
    for layer, moe in balancing_layers(model, config.freeze).items():
        load = result.loads[layer]
        moe.balance.step(load.wanted_E, load.dropped_fraction)


def _documents(model: Decoder, batch: Sequence[Batch]) -> dict[int, float]:
    """Documents of a micro-batch on average, by index of the MoE layer: losses by document weigh all alike.

    The layers behind the last block predict further ahead and see the longer documents alone.
    """
    lengths = torch.cat([_lengths(micro) for micro in batch])
    ahead = {layer: max(layer - model.config.layers + 1, 0) for layer in model.config.moe_layers}
    return {layer: int((lengths > depth).sum()) / len(batch) for layer, depth in ahead.items()}


def _lengths(batch: Batch) -> Tensor:
    """Valid tokens of each document, 0 for those that a row does not have."""
    count_BS = torch.zeros_like(batch.sequence_BS)
    return count_BS.scatter_add_(1, batch.sequence_BS, batch.valid_BS.long()).flatten()


def _options(
    config: Training, step: int, micro: int, earlier: Mapping[int, Tensor], documents: Mapping[int, float]
) -> Options:
    """Noise comes from (seed, step, micro-batch) alone, so that a resume needs no generator state."""
    digest = hashlib.sha256(f"{config.seed}/{step}/{micro}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return Options(
        mode=Mode(training=True, generator=generator, earlier=earlier, documents=documents),
        dtype=torch_dtype(config.dtype),
        recompute=config.recompute,
    )
