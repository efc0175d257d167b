"""Losses and gradient norms far above the steps before: found, told, and skipped where that is asked."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from consilium.config.optimizer import Spikes
from consilium.words.say import say

NORMAL: Final = 1.4826
"""Standard deviation of normal values over their median distance from the median."""
LEAST: Final = 0.02
"""Of the median: the spread of values that are all but equal."""
FEWEST: Final = 16
"""Ordinary steps before anything is judged."""
PATIENCE: Final = 10
"""Spikes in a row after which theirs is the new level: a run must not skip for ever."""
LOSSES: Final = "spikes/losses"
NORMS: Final = "spikes/norms"
ROW: Final = "spikes/row"


@dataclass(frozen=True, slots=True)
class Spike:
    value: float
    usual: float
    """Median of the window."""
    of_loss: bool
    """Else of the gradient norm."""

    def told(self, step: int) -> str:
        numbers = {"step": step, "value": self.value, "usual": self.usual}
        if self.of_loss:
            return say("step {step}: the loss jumped to {value:.4g}, usual is {usual:.4g}", **numbers)
        return say("step {step}: the gradient norm jumped to {value:.4g}, usual is {usual:.4g}", **numbers)


@final
class Watch:
    """The windows, state of a run: ordinary steps enter, never a spike or what is not finite."""

    def __init__(self, config: Spikes) -> None:
        self._config = config
        self._losses = deque[float](maxlen=config.window)
        self._norms = deque[float](maxlen=config.window)
        self._row = 0

    def see(self, loss: float, norm: float) -> Spike | None:
        """Judge a step by those before it and remember it, unless it is a spike or not finite."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return None
        spike = self._judged(loss, self._losses, of_loss=True) or self._judged(
            norm, self._norms, of_loss=False
        )
        self._row = self._row + 1 if spike else 0
        if self._row >= PATIENCE:
            self._begin_anew()
        elif spike is None:
            self._losses.append(loss)
            self._norms.append(norm)
        return spike

    def state(self) -> dict[str, Tensor]:
        """Float64, so that a resume decides by the same bits."""
        row = torch.tensor([self._row], dtype=torch.float64)
        return {LOSSES: _tensor(self._losses), NORMS: _tensor(self._norms), ROW: row}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of ``state``; a checkpoint from before there was one begins with empty windows."""
        if LOSSES in state:
            self._losses.extend(state[LOSSES].tolist())
            self._norms.extend(state[NORMS].tolist())
            self._row = int(state[ROW])

    def _judged(self, value: float, window: deque[float], *, of_loss: bool) -> Spike | None:
        if len(window) < FEWEST:
            return None
        usual = statistics.median(window)
        distance = statistics.median(abs(other - usual) for other in window)
        spread = max(NORMAL * distance, LEAST * abs(usual))
        return Spike(value, usual, of_loss) if value > usual + self._config.deviations * spread else None

    def _begin_anew(self) -> None:
        self._losses.clear()
        self._norms.clear()
        self._row = 0


def _tensor(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
