"""Documents and the rule that decides which of them are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TAIL = " (tail)"
"""Ends the name of a piece that was cut off a text because there was no whole one to hold out."""


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text before the split. Texts of one ``unit`` are held out together or not at all."""

    text: str
    domain: str
    name: str
    unit: str


@dataclass(frozen=True, slots=True)
class Document:
    """A piece of text with its domain, a name unique inside the domain, and its side of the split."""

    text: str
    domain: str
    name: str
    held_out: bool


def stable_fraction(name: str, *, salt: str) -> float:
    """Map a name to [0, 1), evenly and the same on every machine and in every process."""
    digest = hashlib.sha256(f"{salt}\0{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def split(texts: Iterable[Text], fraction: float) -> list[Document]:
    """Hold out about ``fraction`` of the units, each decided by the hash of its own name alone.

    Adding a file therefore moves no other file. A domain of which the hash draws no unit, or all of them,
    cannot be split by file: there all units train, but for the tail of the largest text, cut off at a
    paragraph or a line.
    The documents come back sorted by domain and name.
    """
    by_domain: dict[str, list[Text]] = {}
    for text in texts:
        by_domain.setdefault(text.domain, []).append(text)
    documents = [d for members in by_domain.values() for d in _split_domain(members, fraction)]
    return sorted(documents, key=lambda document: (document.domain, document.name))


def _split_domain(texts: Sequence[Text], fraction: float) -> list[Document]:
    held_out = [stable_fraction(text.unit, salt="held out") < fraction for text in texts]
    if any(held_out) and not all(held_out):
        return [Document(t.text, t.domain, t.name, held) for t, held in zip(texts, held_out, strict=True)]
    largest = max(texts, key=lambda text: (len(text.text), text.name))
    rest = [Document(t.text, t.domain, t.name, False) for t in texts if t is not largest]
    return [*rest, *_cut_tail(largest, fraction)]


def _cut_tail(text: Text, fraction: float) -> list[Document]:
    cut = _boundary(text.text, round(len(text.text) * (1 - fraction)))
    parts = ((text.text[:cut], text.name, False), (text.text[cut:], text.name + TAIL, True))
    return [Document(part, text.domain, name, held) for part, name, held in parts if part]


def _boundary(text: str, target: int) -> int:
    """Return the last paragraph, line or word break in the tenth before ``target``, or ``target`` itself."""
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, target * 9 // 10, target)
        if found > 0:
            return found + len(mark)
    return max(target, 1)


def corpus_sha256(documents: Iterable[Document]) -> str:
    """Hash domains, names, sides and texts, each preceded by its length so that no two corpora collide."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.domain, document.name, str(document.held_out), document.text):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()
