"""One optimizer step: micro-batches forward and backward, guard, update, balance.

Legend: E routed experts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from consilium.config.optimizer import Muon
from consilium.config.training import Training
from consilium.data.batch import Batch
from consilium.data.loader import Loader
from consilium.evaluation.loads import ExpertLoad, LoadCounter
from consilium.model.build import torch_dtype
from consilium.model.decoder import Decoder
from consilium.model.types import Inputs, Objective, Options
from consilium.moe.types import Average, Counted, Mode, Reduce, Taken
from consilium.parallel.mesh import ALONE, Mesh
from consilium.training import guard
from consilium.training.freeze import balancing_layers
from consilium.training.objective import Loss, Share, training_loss
from consilium.training.optimizer import Optimizer, set_rate
from consilium.training.qk_clip import clip_heads
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
    step: int
    """Steps of the run that were done before."""
    targets: int
    """Tokens that were predicted. Without any there is no loss: it is NaN, and nothing moves."""
    largest: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])
    """float32 [H] largest logit of each head by index of the block, where heads are to be clipped."""


def train_step(
    model: Decoder,
    optimizer: Optimizer,
    loader: Loader,
    config: Training,
    step: int,
    mesh: Mesh = ALONE,
) -> StepResult:
    """Run step ``step`` (from 0): a pure function of weights, optimizer state, configuration and step.

    A non-finite loss or gradient norm, in whichever process, leaves weights, moments and balance state of all
    of them untouched; so does a step in which no token is learned.
    """
    result = gradients(model, loader, config, step, mesh)
    if not result.skipped:
        update(model, optimizer, config, result, mesh)
    return result


def gradients(model: Decoder, loader: Loader, config: Training, step: int, mesh: Mesh = ALONE) -> StepResult:
    """Everything of a step up to its gradients, which are clipped: no weight has moved yet."""
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    batch = {i: loader.micro(step, i, config.accumulate).to(device) for i in mine(config.accumulate, mesh)}
    targets = torch.stack([(micro.targets_BS >= 0).sum() for micro in batch.values()]).sum()
    share = Share(int(mesh.world.sum(targets)), config.accumulate)
    view = _View(config, step, mesh.world.sum, _averages(model, list(batch.values()), mesh.world.sum))
    view = dataclasses.replace(view, whole=_counted_ahead(model, batch, view))
    losses: list[Loss] = []
    loads = LoadCounter()
    for i, micro in batch.items():
        options = view.options(i, loads.counted)
        losses.append(training_loss(model, micro, share, options=options))
        losses[-1].total.backward()
        loads.add(losses[-1].reports.values())
    norm = guard.clip(model, config.optimizer.clip, mesh)
    rate = learning_rate(config.schedule, config.optimizer.learning_rate, step, config.steps)
    sums = _summed(losses, sum(int(micro.valid_BS.sum()) for micro in batch.values()), mesh)
    loss, ce = (sums["total"], sums["nll"] / share.targets) if share.targets else (math.nan, math.nan)
    return StepResult(
        loss=loss,
        ce=ce,
        ahead=sums["ahead"],
        balance={name: sums[f"balance/{name}"] for name in losses[0].balance},
        norm=norm,
        rate=rate,
        tokens=int(sums["tokens"]),
        loads=loads.result(mesh.world.sum),
        skipped=not guard.is_healthy(loss, norm),
        step=step,
        targets=share.targets,
        largest=_largest(losses, mesh),
    )


def update(
    model: Decoder, optimizer: Optimizer, config: Training, result: StepResult, mesh: Mesh = ALONE
) -> None:
    """Move the weights by their gradients, then the balance by what the routers wanted.

    Loads after drops would tell a full expert from an overfull one no longer (2408.15664 counts assignments).
    """
    set_rate(optimizer, result.rate)
    with mesh.sharding.local(model):
        optimizer.step()
    if isinstance(config.optimizer, Muon) and config.optimizer.qk_clip is not None:
        clip_heads(model, result.largest, config.optimizer.qk_clip, mesh.sharding.part)
    progress = result.step / config.steps
    for layer, moe in balancing_layers(model, config.freeze).items():
        load = result.loads[layer]
        moe.balance.step(Taken(load.wanted_E, load.dropped_fraction, load.margins, progress, mesh.world.sum))


def _largest(losses: Sequence[Loss], mesh: Mesh) -> dict[int, Tensor]:
    here = {
        layer: torch.stack([loss.largest[layer] for loss in losses]).amax(0) for layer in losses[0].largest
    }
    return dict(zip(here, mesh.world.largest(*here.values()), strict=True))


def mine(micro_batches: int, mesh: Mesh) -> range:
    """The micro-batches of a step that this process runs: every so many, as if all ran one after another."""
    return range(mesh.world.rank, micro_batches, mesh.world.size)


def _summed(losses: Sequence[Loss], tokens: int, mesh: Mesh) -> dict[str, float]:
    """Losses by what they are of, and tokens, of all micro-batches in all processes."""
    found: dict[str, float] = {
        "total": sum(float(loss.total.detach()) for loss in losses),
        "nll": sum(float(loss.nll) for loss in losses),
        "ahead": sum(float(loss.ahead) for loss in losses),
        "tokens": tokens,
    }
    for name in losses[0].balance:
        found[f"balance/{name}"] = sum(float(loss.balance[name]) for loss in losses)
    sums = mesh.world.sum(torch.tensor(list(found.values()), dtype=torch.float64))
    return dict(zip(found, sums.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class _View:
    """What every micro-batch of a step knows of the step."""

    config: Training
    step: int
    reduce: Reduce
    average: Mapping[int, Average]
    whole: Mapping[int, Counted] | None = None

    def options(self, micro: int, earlier: Mapping[int, Counted], *, counts_only: bool = False) -> Options:
        """Noise comes from (seed, step, micro-batch) alone, so that a resume needs no generator state."""
        digest = hashlib.sha256(f"{self.config.seed}/{self.step}/{micro}".encode()).digest()
        mode = Mode(
            training=True,
            generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")),
            earlier=earlier,
            whole=self.whole,
            average=self.average,
            reduce=self.reduce,
            counts_only=counts_only,
        )
        above = self.config.optimizer.qk_clip if isinstance(self.config.optimizer, Muon) else None
        return Options(
            mode=mode,
            dtype=torch_dtype(self.config.dtype),
            recompute=self.config.recompute,
            peaks_above=above,
        )


@torch.no_grad()
def _counted_ahead(model: Decoder, batch: Mapping[int, Batch], view: _View) -> Mapping[int, Counted] | None:
    """What all micro-batches will choose, for losses that read it; None where one pass is the whole step.

    The passes draw the noise that the passes with gradients draw again.
    """
    moe = model.config.moe
    if moe is None or not moe.balance.counts_ahead or len(batch) == 1:
        return None
    loads = LoadCounter()
    for i, micro in batch.items():
        options = view.options(i, {}, counts_only=True)
        losses = model(Inputs.of(micro), options=options, objective=Objective(micro.targets_BS))
        loads.add(losses.reports.values())
    return {layer: counted.over(view.reduce) for layer, counted in loads.counted.items()}


def _averages(model: Decoder, batch: Sequence[Batch], reduce: Reduce) -> dict[int, Average]:
    """What a micro-batch holds on average, by index of the MoE layer.

    The layers behind the last block predict further ahead and see the longer documents alone.
    """
    lengths_BS = torch.cat([_lengths(micro) for micro in batch])
    ahead = {layer: max(layer - model.config.layers + 1, 0) for layer in model.config.moe_layers}
    averages: dict[int, Average] = {}
    for depth in sorted(set(ahead.values())):
        left_BS = (lengths_BS - depth).clamp_min(0)
        held = left_BS.sum(), (left_BS > 0).sum(), (left_BS > 0).any(dim=1).sum()
        totals = reduce(torch.stack([*held, held[0].new_tensor(len(batch))])).tolist()
        averages[depth] = Average(*(total / totals[-1] for total in totals[:-1]))
    return {layer: averages[depth] for layer, depth in ahead.items()}


def _lengths(batch: Batch) -> Tensor:
    """Valid tokens of each document of a row, 0 for those that a row does not have."""
    count_BS = torch.zeros_like(batch.sequence_BS)
    return count_BS.scatter_add_(1, batch.sequence_BS, batch.valid_BS.long())
