"""Learning rates and batch sizes as pure functions of the step, so that a resume needs no schedule state."""

from __future__ import annotations

import math

from consilium.config.optimizer import WSD, Constant, Cosine, LinearRamp, NoRamp, Schedule, StepDecay
from consilium.config.training import Training


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """The rate of optimizer step ``step`` (from 0) of ``steps``."""
    warm = _share(schedule.warmup, steps)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * _after_warmup(schedule, step, warm, steps)


def first_batches(config: Training) -> tuple[int, ...]:
    """Sequences of each of the first steps, before ``config.batch`` holds: whole sequences a micro-batch."""
    match config.ramp:
        case NoRamp():
            return ()
        case LinearRamp(start=start, share=share):
            steps = _share(share, config.steps)
            micro = config.accumulate
            risen = ((config.batch - start) * (step + 0.5) / steps for step in range(steps))
            return tuple(micro * math.floor((start + more) / micro + 0.5) for more in risen)


def mean_batch(config: Training) -> float:
    """Sequences a step over the whole run, about: how many steps so much text is."""
    match config.ramp:
        case NoRamp():
            return config.batch
        case LinearRamp(start=start, share=share):
            return config.batch - share * (config.batch - start) / 2


def _after_warmup(schedule: Schedule, step: int, warm: int, steps: int) -> float:
    match schedule:
        case Constant():
            return 1.0
        case Cosine(final=final):
            progress = _progress(step, warm, steps)
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        case WSD(decay=decay, final=final):
            start = max(warm, steps - _share(decay, steps))
            return 1 - (1 - final) * _progress(step, start, steps)
        case StepDecay(at=at, factor=factor):
            return factor ** sum(step >= _share(fraction, steps) for fraction in at)


def _share(fraction: float, steps: int) -> int:
    """Steps that are ``fraction`` of all, begun ones whole. 0.07 * 100 is 7.000000000000001 in binary."""
    return math.ceil(round(fraction * steps, 6))


def _progress(step: int, start: int, steps: int) -> float:
    """From 0 at ``start`` to 1 at the last step, which so reaches the end however short the way is.

    The first step of all is never the end: a run of one step would train at the final rate, which may be 0.
    """
    last = steps - 1
    return 1.0 if step >= max(last, start, 1) else max(0, step - start) / max(last - start, 1)
