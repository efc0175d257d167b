"""The one error type for a user's mistake, and the nearest-match hint that goes with it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class ConsiliumError(ValueError):
    """A user's mistake in one sentence: what, where, why and what to do. The command exits with 2.

    It may quote a file of anybody's, so it is kept in :func:`one_line`.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(one_line(sentence))


def one_line(text: str) -> str:
    """Return ``text`` with blanks for its line breaks; what else would steer a terminal is shown escaped."""
    joined = re.sub(r"\s*[\r\n]\s*", " ", text.strip())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in joined)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the word that was meant, or the list when none is near."""
    choices = sorted(known)
    meant = closest(word, choices)
    if meant is not None:
        return f" Did you mean {meant!r}?"
    return f" Known: {', '.join(choices)}." if choices else ""


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that ``word`` is a slip of the finger or an abbreviation of, if there is one.

    A hint that misleads is worse than none: ``--model`` is not ``--help``, and v4 is not v3.
    """
    near = [one for one in known if _is_meant(word.lower(), one.lower())]
    return max(near, key=lambda one: difflib.SequenceMatcher(None, word, one).ratio(), default=None)


def _is_meant(word: str, known: str) -> bool:
    bare, other = word.strip("-"), known.strip("-")
    if len(bare) > 1 and other.startswith(bare):
        return True
    digits = sorted(filter(str.isdigit, bare)) == sorted(filter(str.isdigit, other))
    return digits and (_slips(bare, other) <= max(1, len(bare) // 4) or _abbreviates(bare, other))


def _abbreviates(word: str, known: str) -> bool:
    """Whether ``word`` is one of the parts of ``known``, or letters of it in order, as ``bf16``."""
    rest = iter(known)
    in_order = len(word) > 2 and word[0] == known[:1] and all(letter in rest for letter in word)
    return in_order or word in known.replace("_", "-").split("-")


def _slips(a: str, b: str) -> int:
    """Letters added, lost, exchanged, or swapped with a neighbour (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a):
        last, before, row = before, row, [i + 1]
        for j, other in enumerate(b):
            slips = min(before[j] + (letter != other), before[j + 1] + 1, row[j] + 1)
            if i and j and (a[i - 1], letter) == (other, b[j - 1]):
                slips = min(slips, last[j - 1] + 1)
            row.append(slips)
    return row[-1]
