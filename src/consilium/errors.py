"""The one error type for a user's mistake, and the nearest-match hint that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConsiliumError(ValueError):
    """A user's mistake in one sentence: what, where, why and what to do. The command exits with 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known word, or the list when nothing is close."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(choices)}." if choices else ""
