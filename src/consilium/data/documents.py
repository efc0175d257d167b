"""Texts, documents, and the rule that decides which of them are held out.

Legend: N texts.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from consilium.data.forms import Content, plain

TAIL = " (tail)"
"""Ends the name of a piece that was cut off a text because there was no whole one to hold out."""
LONGEST = 2**18
"""Characters of a text; a longer one is read as several, so that memory does not grow with it."""
_FARTHEST = 2**16
"""Characters before a cut that are looked through for the end of a paragraph."""


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text before the split. Texts of one ``unit`` are held out together or not at all."""

    content: Content
    domain: str
    name: str
    unit: str

    @property
    def text(self) -> str:
        return plain(self.content)


@dataclass(frozen=True, slots=True)
class Document:
    """A piece of text with its domain, a name unique inside the domain, and its side of the split."""

    content: Content
    domain: str
    name: str
    held_out: bool

    @property
    def text(self) -> str:
        return plain(self.content)


class Measures(Protocol):
    """What the split needs to know of texts, by their places; they need not be in memory."""

    @property
    def unit_N(self) -> NDArray[np.float64]:
        """``stable_fraction`` of the units: equal where they are."""
        ...

    @property
    def characters_N(self) -> NDArray[np.int64]: ...

    @property
    def plain_N(self) -> NDArray[np.bool_]:
        """Whether a text can be cut."""
        ...


def stable_fraction(name: str, *, salt: str) -> float:
    """Map a name to [0, 1), evenly and the same on every machine and in every process."""
    digest = hashlib.sha256(f"{salt}\0{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def unit_fraction(unit: str) -> float:
    """What decides the side of a unit."""
    return stable_fraction(unit, salt="held out")


def split_domain(texts: Measures, fraction: float) -> NDArray[np.int64]:
    """Return how many characters of each text of one domain train, from its beginning; the rest is held out.

    About ``fraction`` of the units are held out, each decided by the hash of its own name alone, so that
    adding a file moves no other file. A domain of which the hash draws no unit, or all of them, cannot be
    split by unit: there all units train, but for the tail of the largest one.
    """
    held_N = texts.unit_N < fraction
    if held_N.any() and not held_N.all():
        return np.where(held_N, 0, texts.characters_N)
    kept_N = texts.characters_N.copy()
    if not texts.plain_N.any():
        if len(np.unique(texts.unit_N)) > 1:
            kept_N[texts.unit_N == texts.unit_N.min()] = 0
        return kept_N
    units, of_N = np.unique(np.where(texts.plain_N, texts.unit_N, -1.0), return_inverse=True)
    sizes = np.bincount(of_N, weights=texts.characters_N) * (units >= 0)
    (places,) = np.nonzero(of_N == int(sizes.argmax()))
    left = round(float(sizes.max()) * (1 - fraction))
    for place in places.tolist():
        kept_N[place] = min(left, kept_N[place])
        left -= int(kept_N[place])
    return kept_N


def split(texts: Sequence[Text], fraction: float) -> list[Document]:
    """Split texts in memory, by domain; the documents come back sorted by domain and name."""
    documents: list[Document] = []
    for domain in sorted({text.domain for text in texts}):
        members = [text for text in texts if text.domain == domain]
        kept_N = split_domain(TextMeasures.of(members), fraction)
        documents += [d for text, kept in zip(members, kept_N.tolist(), strict=True) for d in cut(text, kept)]
    return sorted(documents, key=lambda document: (document.domain, document.name))


@dataclass(frozen=True, slots=True)
class TextMeasures:
    """Of texts in memory."""

    unit_N: NDArray[np.float64]
    characters_N: NDArray[np.int64]
    plain_N: NDArray[np.bool_]

    @staticmethod
    def of(texts: Sequence[Text]) -> TextMeasures:
        return TextMeasures(
            np.array([unit_fraction(text.unit) for text in texts]),
            np.array([len(text.text) for text in texts], dtype=np.int64),
            np.array([isinstance(text.content, str) for text in texts]),
        )


def cut(text: Text, kept: int) -> list[Document]:
    """Return the documents of ``text``, of which the first ``kept`` characters, or nearly so many, train.

    What is cut is cut at a paragraph or a line.
    """
    if not isinstance(text.content, str) or not 0 < kept < len(text.content):
        return [Document(text.content, text.domain, text.name, held_out=kept == 0)]
    at = boundary(text.content, kept)
    parts = ((text.content[:at], text.name, False), (text.content[at:], text.name + TAIL, True))
    return [Document(part, text.domain, name, held) for part, name, held in parts if part]


def boundary(text: str, target: int) -> int:
    """Return the last paragraph, line or word break in the tenth before ``target``, or ``target`` itself."""
    start = max(target * 9 // 10, target - _FARTHEST)
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, start, target)
        if found > 0:
            return found + len(mark)
    return max(target, 1)


def bounded(text: Text) -> Iterator[Text]:
    """Cut a text that is longer than ``LONGEST`` into several of one unit."""
    content = text.content
    if not isinstance(content, str) or len(content) <= LONGEST:
        yield text
        return
    for number, part in enumerate(parts([content]), start=1):
        yield dataclasses.replace(text, content=part, name=part_name(text.name, number))


def part_name(name: str, number: int) -> str:
    return f"{name} ({number})"


def parts(pieces: Iterable[str]) -> Iterator[str]:
    """Join the pieces of one text and cut it anew where it grows beyond ``LONGEST``."""
    held = ""
    for piece in pieces:
        held += piece
        while len(held) > LONGEST:
            at = boundary(held, LONGEST)
            yield held[:at]
            held = held[at:]
    if held:
        yield held
