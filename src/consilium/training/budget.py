"""How long a run is: steps, tokens, or minutes that a short calibration turns into steps once."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from consilium.config.optimizer import NoRamp
from consilium.config.training import Training
from consilium.data.corpus import Corpus
from consilium.errors import ConsiliumError
from consilium.parallel.mesh import ALONE, Mesh
from consilium.training.freeze import freeze
from consilium.training.optimizer import build_optimizer
from consilium.training.run import loader_of
from consilium.training.schedule import mean_batch
from consilium.training.spread import dealt, drawn
from consilium.training.step import train_step
from consilium.words.say import say

CALIBRATION_SECONDS = 6.0
WARM_UP_STEPS = 2
FEWEST_STEPS = 5
FAR_OFF = 1.5
"""Times the minutes that were asked for, or their fraction, from which the end says so."""


@dataclass(frozen=True, slots=True)
class Steps:
    count: int


@dataclass(frozen=True, slots=True)
class Tokens:
    count: int


@dataclass(frozen=True, slots=True)
class Minutes:
    count: float


Budget = Steps | Tokens | Minutes


def with_budget(
    config: Training, budget: Budget, corpus: Corpus, *, notice: Callable[[str], None], mesh: Mesh = ALONE
) -> Training:
    """Return ``config`` with its number of steps, the same in all processes of ``mesh``.

    Minutes are measured here and never again: the steps are stored.
    """
    match budget:
        case Steps() | Tokens():
            steps = steps_of(budget, config)
        case Minutes(count=count):
            whole = dataclasses.replace(config, ramp=NoRamp())
            seconds = step_seconds(whole, corpus, mesh=mesh) * mean_batch(config) / config.batch
            steps = _at_least_one(count * 60 / seconds, budget)
            notice(
                say(
                    "calibrated: {seconds:.3f} s a step, so {minutes:g} minutes are {steps} steps",
                    seconds=seconds,
                    minutes=count,
                    steps=steps,
                )
            )
    return dataclasses.replace(config, steps=steps)


def steps_of(budget: Steps | Tokens, config: Training) -> int:
    """What needs no measuring. Raises ConsiliumError for less than one step."""
    size = 1 if isinstance(budget, Steps) else mean_batch(config) * config.data.sequence_length
    return _at_least_one(budget.count / size, budget)


def _at_least_one(steps: float, budget: Budget) -> int:
    if round(steps) < 1:
        raise ConsiliumError(f"the budget {budget.count:g} is less than one step; give more.")
    return round(steps)


def step_seconds(
    config: Training, corpus: Corpus, *, seconds: float = CALIBRATION_SECONDS, mesh: Mesh = ALONE
) -> float:
    """Time of a training step, measured on a throw-away copy of the run for about ``seconds``.

    A quarter of the steps is faster: other work on the machine only ever slows a step down, and a few slow
    ones must not make a run a tenth of what was asked for.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    config = dealt(config, mesh)
    model = drawn(config, mesh)
    freeze(model, config.freeze)
    optimizer = build_optimizer(model, config.optimizer, mesh.sharding)
    loader = loader_of(config, corpus)
    measured: list[float] = []
    step = 0
    while step < WARM_UP_STEPS + FEWEST_STEPS or mesh.world.of_first(sum(measured)) < seconds:
        begun = time.perf_counter()
        train_step(model, optimizer, loader, config, step, mesh)
        if step >= WARM_UP_STEPS:
            measured.append(time.perf_counter() - begun)
        step += 1
    return mesh.world.of_first(statistics.quantiles(measured, n=4)[0])


def missed(budget: Budget, seconds: float) -> str | None:
    """A sentence where a run took far more or less time than the minutes that it was given."""
    if not isinstance(budget, Minutes) or 1 / FAR_OFF < seconds / (60 * budget.count) < FAR_OFF:
        return None
    return say(
        "note: {seconds:.0f} s of training for the {asked:.0f} s asked for: steps are counted out at the"
        " start, and the machine was busier, or freer, while its speed was measured",
        seconds=seconds,
        asked=60 * budget.count,
    )
