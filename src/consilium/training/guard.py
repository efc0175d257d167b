"""What a run refuses: more memory than there is, steps and weights that are not finite."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from consilium.config.training import Training
from consilium.disk.files import refuse_full
from consilium.errors import ConsiliumError
from consilium.machine.memory import asked_for, is_out_of_memory, memory_limit, refuse_beyond_memory
from consilium.parallel.mesh import ALONE, Mesh
from consilium.planner.parameters import parameters
from consilium.planner.training import run_memory

PATIENCE = 10
"""Bad steps in a row after which the run stops: the data or the learning rate is at fault, not chance."""


def clip(model: nn.Module, largest: float, mesh: Mesh = ALONE) -> float:
    """Scale gradients to a global norm of at most ``largest`` and return the norm before. NaN stays NaN.

    Every value counts once, in whichever process it is.
    """
    with mesh.sharding.local(model):
        trained = [p for p in model.parameters() if p.grad is not None]
        here = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None], foreach=True)
        norm = mesh.replica.sum(here.double().square()).sqrt().to(here.dtype)
        if not float(norm) <= largest:  # to multiply by 1 would read and write every gradient for nothing
            torch.nn.utils.clip_grads_with_norm_(trained, largest, norm, foreach=True)
    return float(norm)


def is_healthy(loss: float, norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(norm)


@contextlib.contextmanager
def memory_told(config: Training, step: int) -> Iterator[None]:
    """Say in one sentence where memory went and what takes less. Raises ConsiliumError for the failure."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        held, limit = run_memory(config).total, memory_limit()
        there = "" if limit is None else f" of {limit / 2**30:,.2f} GiB"
        rows, length = config.batch // config.accumulate, config.data.sequence_length
        raise ConsiliumError(
            f"out of memory in step {step}{asked_for(error)}: weights, gradients and optimizer state take"
            f" {held / 2**30:,.2f} GiB{there}, and what {rows} sequences of {length} tokens leave for the"
            f" backward pass comes on top; set accumulate above {config.accumulate} or recompute to true,"
            " lower --batch or --seq, or choose optimizer.state.kind int8 in a new run."
        ) from error


def check_patience(skipped_in_a_row: int, step: int) -> None:
    """Raise ConsiliumError once ``PATIENCE`` steps in a row were skipped."""
    if skipped_in_a_row >= PATIENCE:
        raise ConsiliumError(
            f"training stopped at step {step}: loss or gradient was not finite {PATIENCE} steps in a row;"
            " the weights are those of the last good step. Lower --lr, or look for bad values in the weights."
        )


def check_memory(config: Training, mesh: Mesh = ALONE) -> None:
    """Raise ConsiliumError where weights, gradients and optimizer state are more than memory and swap."""
    model = config.model
    refuse_beyond_memory(
        run_memory(config).total * _here(mesh) // mesh.world.size,
        f"training {model.family} with {parameters(model).total:,} parameters",
        "choose a smaller size, such as :tiny, or scale it with --params",
    )


def _here(mesh: Mesh) -> int:
    """Processes of the run on this machine, as torchrun says it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world.size))


def check_disk(config: Training, out: Path) -> None:
    """Raise ConsiliumError where the disk cannot hold one checkpoint: all steps would be run for nothing."""
    refuse_full(out, run_memory(config).checkpoint, "a checkpoint")


def check_weights(model: nn.Module, step: int) -> None:
    """Raise ConsiliumError where a weight is not finite: such a state is never saved over a good one."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ConsiliumError(
                f"training stopped at step {step}: {name} is no longer finite, so this step was not saved;"
                " start anew with a lower --lr in another --out."
            )
