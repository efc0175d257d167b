"""How often work that takes long speaks of itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, final

QUIET_SECONDS: Final = 2.0
"""What is over by then says nothing on the way."""
LOG_SECONDS: Final = 10.0
"""Between two lines of a log, where each of them stays."""


@final
class Seldom:
    """Passes a sentence on where the last one is long enough ago, and none of the first seconds."""

    def __init__(self, report: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._report, self._clock = report, clock
        self._next = clock() + QUIET_SECONDS

    def __call__(self, text: str) -> None:
        if self._clock() >= self._next:
            self._next = self._clock() + LOG_SECONDS
            self._report(text)
