"""Stop texts in a stream: found across the borders of tokens, and never let out, not even their beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final


@final
class StopText:
    """Passes text on but for the longest end of it that may still become a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Return what is known to precede every stop text; after one is ``found``, nothing."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max((_beginning_at_end(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back: the text ended without becoming a stop text."""
        held, self._held = self._held, ""
        return held


def _beginning_at_end(text: str, stop: str) -> int:
    """The longest proper beginning of ``stop`` that ``text`` ends with, in characters."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
