"""Filters: texts that score too low as no advertisement, or as fluent, are dropped before the split.

A classifier is a logistic regression over hashed pieces of letters and a few numbers that tell the shape of a
text. It is trained on the spot, on examples that we generate, and comes out the same everywhere.

Legend: X features.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Protocol, final

import numpy as np
from numpy.typing import NDArray

from consilium.config.data import Advertisement, Filter, Fluency
from consilium.data.documents import Text
from consilium.data.examples import examples
from consilium.data.forms import plain
from consilium.records.dropped import Dropped

VERSION: Final = 1
"""Changes when the same text would score otherwise."""
_BUCKETS: Final = 2**14
_READ: Final = 4000
"""Characters from the beginning of a text that are scored."""
_EXAMPLES: Final = 2400
_PASSES: Final = 12
_RATE, _DECAY = 0.1, 1e-3
_SHAPES: Final = 13
"""Numbers of ``_shape``, and one that is always 1."""
_ENDS: Final = ".!?:\n"
_WORD: Final = re.compile(r"\w+")
_COMMON: Final = frozenset(
    _WORD.findall(
        "the of and a to in is was that it he for on as with his be at by i this had not are but from or have"
        " an they which one you were all her she there would their we him been has when who no if out so"
    )
)


class Scorer(Protocol):
    """What a filter asks: how good a text is, from 0 to 1."""

    def score(self, text: str) -> float: ...


@final
class Classifier:
    """Features of a text times weights, through a sigmoid."""

    def __init__(self, weights_X: NDArray[np.float64], shape: _Shape, *, pieces: bool) -> None:
        self._weights_X, self._shape, self._has_pieces = weights_X, shape, pieces

    @staticmethod
    def train(texts: Sequence[tuple[str, bool]], *, pieces: bool) -> Classifier:
        """Fit by AdaGrad, one example after the other in their order, with a small decay.

        Without ``pieces`` the shape alone counts: what is fluent has no vocabulary.
        """
        shape = _Shape.of([_shape(text[:_READ]) for text, _ in texts])
        found = Classifier(np.zeros(_BUCKETS + _SHAPES), shape, pieces=pieces)
        squares_X = np.full(_BUCKETS + _SHAPES, 1e-8)
        examples = [(*found._features(text), good) for text, good in texts]
        for _ in range(_PASSES):
            for places, values, good in examples:
                error = _sigmoid(float(found._weights_X[places] @ values)) - good
                gradient = error * values + _DECAY * found._weights_X[places]
                squares_X[places] += gradient**2
                found._weights_X[places] -= _RATE * gradient / np.sqrt(squares_X[places])
        return found

    def score(self, text: str) -> float:
        places, values = self._features(text)
        return _sigmoid(float(self._weights_X[places] @ values))

    def _features(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Places and values: hashed pieces of 3 and 4 bytes, together of length 1, then the shape."""
        text = text[:_READ]
        places = _pieces(text) if self._has_pieces else np.zeros(0, dtype=np.int64)
        values = np.full(len(places), 1 / np.sqrt(max(len(places), 1)))
        shape = self._shape.scaled(_shape(text))
        return np.append(places, _BUCKETS + np.arange(_SHAPES)), np.append(values, shape)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the shapes of the examples are like, so that none counts for more than another."""

    mean_X: NDArray[np.float64]
    deviation_X: NDArray[np.float64]

    @staticmethod
    def of(shapes: Sequence[NDArray[np.float64]]) -> _Shape:
        found = np.stack(shapes)
        return _Shape(found.mean(0), found.std(0) + 1e-3)

    def scaled(self, shape_X: NDArray[np.float64]) -> NDArray[np.float64]:
        """Within three deviations: text unlike any example must not be judged by one number."""
        return np.append(np.clip((shape_X - self.mean_X) / self.deviation_X, -3, 3), 1.0)


def _pieces(text: str) -> NDArray[np.int64]:
    """FNV-1a over each run of 3 and of 4 bytes, by bucket."""
    data = np.frombuffer(text.lower().encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.uint32)
    found: list[NDArray[np.uint32]] = [np.zeros(0, dtype=np.uint32)]
    for size in (3, 4):
        count = max(len(data) - size + 1, 0)
        hashed = np.full(count, 2166136261, dtype=np.uint32)
        for offset in range(size):
            hashed = (hashed ^ data[offset : offset + count]) * np.uint32(16777619)
        found.append((hashed >> np.uint32(11)) % np.uint32(_BUCKETS))
    return np.unique(np.concatenate(found)).astype(np.int64)


def _shape(text: str) -> NDArray[np.float64]:
    words = [word.lower() for word in _WORD.findall(text)]
    tokens = text.split()
    count, letters = max(len(words), 1), max(len(text), 1)
    pairs = list(pairwise(words))
    common = [word in _COMMON for word in words]
    shares = [
        sum(map(str.isalpha, text)) / letters,
        sum(map(str.isdigit, text)) / letters,
        len(tokens) / letters,
        sum(c in ".,;:!?" for c in text) / count,
        sum(not c.isalnum() and not c.isspace() and c not in ".,;:!?'-" for c in text) / letters,
        sum(common) / count,
        sum(a and b for a, b in pairwise(common)) / count,
        len(set(words)) / count,
        len(set(pairs)) / max(len(pairs), 1),
        sum(a == b for a, b in pairs) / count,
        (text.count("!") + text.count("$") + text.count("%")) / count,
        _flow(tokens),
    ]
    return np.array(shares)


def _flow(tokens: Sequence[str]) -> float:
    """Share of the capitals that begin a sentence, and of the ends of sentences before a capital."""
    pairs = list(pairwise([".", *tokens]))
    capitals = [before[-1] in _ENDS for before, token in pairs if token[0].isupper()]
    ends = [token[0].isupper() for before, token in pairs if before[-1] in _ENDS]
    return (sum(capitals) + sum(ends)) / max(len(capitals) + len(ends), 1)


def _sigmoid(value: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(value, -40, 40))))


@functools.cache
def classifier(kind: str) -> Classifier:
    """The built-in one, trained when it is first asked for: about a second."""
    return Classifier.train(examples(kind, _EXAMPLES, seen=True), pieces=kind == "advertisement")


def scorer(chosen: Filter) -> Scorer:
    match chosen:
        case Advertisement() | Fluency():
            return classifier(chosen.kind)


@final
class Sieve:
    """Several filters in a row."""

    def __init__(self, filters: Sequence[Filter]) -> None:
        self._scorers = [(chosen, scorer(chosen)) for chosen in filters]

    def dropped(self, text: Text) -> Dropped | None:
        """The first filter that drops ``text``, None where it stays."""
        for chosen, of in self._scorers:
            score = of.score(plain(text.content))
            if score < chosen.least:
                return Dropped(text.name, text.domain, chosen.kind, score)
        return None
