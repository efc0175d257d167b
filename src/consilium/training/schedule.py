"""Learning rates as pure functions of the step, so that a resume needs no schedule state."""

from __future__ import annotations

import math

from consilium.config.training import WSD, Cosine, Schedule, Steps


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """The rate of optimizer step ``step`` (from 0) of ``steps``."""
    warm = math.ceil(schedule.warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * _after_warmup(schedule, step, warm, steps)


def _after_warmup(schedule: Schedule, step: int, warm: int, steps: int) -> float:
    match schedule:
        case Cosine(final=final):
            progress = (step - warm) / max(steps - 1 - warm, 1)
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        case WSD(decay=decay, final=final):
            start = max(warm, steps - math.ceil(decay * steps))
            progress = max(0, step - start) / max(steps - 1 - start, 1)
            return 1 - (1 - final) * progress
        case Steps(at=at, factor=factor):
            return factor ** sum(step >= fraction * steps for fraction in at)
