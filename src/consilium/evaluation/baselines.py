"""Two yardsticks for bits per byte: a trigram model of the bytes of the training text, and ``xz``.

Legend: N bytes of a text, C contexts, X the byte that follows.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from consilium.data.documents import Document
from consilium.records.run import BitsPerByte

ALPHABET = 256


@dataclass(frozen=True, slots=True)
class Baselines:
    trigram: BitsPerByte
    """Byte trigram model of all training text, whatever the domain."""
    xz: BitsPerByte
    """``xz -9`` on each domain's held-out text alone."""


def baselines(documents: Iterable[Document]) -> Baselines:
    """Measure both on the held-out ``documents``. Takes seconds, and 256 ** 3 counts of memory."""
    train: list[str] = []
    held_out: dict[str, list[str]] = {}
    for document in documents:
        (held_out.setdefault(document.domain, []) if document.held_out else train).append(document.text)
    model = TrigramModel.fit([document_bytes(train)])
    measured = {domain: document_bytes(texts) for domain, texts in held_out.items()}
    return Baselines(
        trigram=BitsPerByte(domains={domain: model.bits_per_byte(text) for domain, text in measured.items()}),
        xz=BitsPerByte(domains={domain: xz_bits_per_byte(text.content) for domain, text in measured.items()}),
    )


def xz_bits_per_byte(data: bytes) -> float:
    """Return 8 times the compressed size over the size, headers included."""
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


@dataclass(frozen=True, slots=True)
class DocumentBytes:
    """Documents end to end. A context never reaches into the document before: it holds zeros instead."""

    content: bytes
    place_N: NDArray[np.int64]
    """Position inside the document."""

    @property
    def bytes_N(self) -> NDArray[np.int64]:
        return np.frombuffer(self.content, dtype=np.uint8).astype(np.int64)

    def before(self, distance: int) -> NDArray[np.int64]:
        """Return the byte ``distance`` places before each, 0 where the document has none."""
        back_N = np.roll(self.bytes_N, distance)
        return np.where(self.place_N >= distance, back_N, 0)


def document_bytes(texts: Iterable[str]) -> DocumentBytes:
    """Join texts as they are, before any tokenizer changed them."""
    encoded = [text.encode() for text in texts]
    places = [np.arange(len(data), dtype=np.int64) for data in encoded]
    return DocumentBytes(b"".join(encoded), np.concatenate([np.zeros(0, dtype=np.int64), *places]))


@dataclass(frozen=True, slots=True)
class Order:
    """What was seen after each context of one length."""

    count_CX: NDArray[np.int64]
    total_C: NDArray[np.int64]
    types_C: NDArray[np.int64]
    """Different bytes seen."""

    @classmethod
    def of(cls, count_CX: NDArray[np.int64]) -> Order:
        return cls(count_CX, count_CX.sum(1), np.count_nonzero(count_CX, axis=1))


@final
@dataclass(frozen=True, slots=True)
class TrigramModel:
    """Byte trigrams, interpolated with bigrams, single bytes and the uniform distribution.

    Witten and Bell, "The zero-frequency problem" (1991), method C: a context seen n times with t different
    bytes after it gives the lower order the weight t / (n + t).
    """

    orders: tuple[Order, ...]
    """Of single bytes, pairs and triples."""

    @classmethod
    def fit(cls, texts: Iterable[DocumentBytes]) -> TrigramModel:
        keys = [_context(text, 2) * ALPHABET + text.bytes_N for text in texts]
        triples = np.bincount(np.concatenate(keys), minlength=ALPHABET**3)
        # The lower orders count what the triples end in, so that all three see the same bytes.
        pairs = triples.reshape(ALPHABET, -1).sum(0)
        singles = pairs.reshape(ALPHABET, -1).sum(0)
        return cls(tuple(Order.of(count.reshape(-1, ALPHABET)) for count in (singles, pairs, triples)))

    def bits_per_byte(self, text: DocumentBytes) -> float:
        return float(-np.log2(self.probability(text)).mean())

    def probability(self, text: DocumentBytes) -> NDArray[np.float64]:
        """Return the probability [N] of each byte after the two before it."""
        probability_N = np.full(len(text.bytes_N), 1 / ALPHABET)
        for number, order in enumerate(self.orders):
            context_N = _context(text, number)
            total_N, types_N = order.total_C[context_N], order.types_C[context_N]
            count_N = order.count_CX[context_N, text.bytes_N]
            mixed_N = (count_N + types_N * probability_N) / np.maximum(total_N + types_N, 1)
            probability_N = np.where(total_N > 0, mixed_N, probability_N)
        return probability_N


def _context(text: DocumentBytes, order: int) -> NDArray[np.int64]:
    """Return the number that the ``order`` bytes before each byte spell, the farthest first."""
    context_N = np.zeros_like(text.bytes_N)
    for distance in range(order, 0, -1):
        context_N = context_N * ALPHABET + text.before(distance)
    return context_N
