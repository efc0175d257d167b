"""Documents to arrays of tokens, with offsets, byte counts and syntax labels.

Legend: T tokens, N documents of one domain on one side of the split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilium.data.documents import TAIL, Document
from consilium.data.syntax import UNKNOWN, label_tokens
from consilium.data.tokenizer import Tokenizer
from consilium.words.say import say

BATCH_CHARACTERS = 1_000_000
"""Text encoded between two lines of progress."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """The documents of one domain on one side, each the token that opens it and then its own."""

    ids_T: NDArray[np.unsignedinteger[Any]]
    """uint16, or uint32 for a vocabulary beyond it."""
    starts_N: NDArray[np.int64]
    """Index of the token that opens each document."""
    syntax_T: NDArray[np.int8]
    """Index into syntax.CLASSES, UNKNOWN where there is none; empty for training text, which needs none."""
    sizes_T: NDArray[np.uint32]
    """Bytes of the source behind each token, whose sum is ``byte_count``; empty for training text."""
    byte_count: int
    """Bytes of the documents in UTF-8, as they were before any tokenizer changed them."""

    @property
    def token_count(self) -> int:
        return len(self.ids_T)

    @property
    def ends_N(self) -> NDArray[np.int64]:
        return np.append(self.starts_N[1:], self.token_count) if len(self.starts_N) else self.starts_N


@dataclass(frozen=True, slots=True)
class Encoded:
    document: Document
    ids_T: NDArray[np.int64]


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document], report: Progress) -> list[Encoded]:
    total = sum(len(document.text) for document in documents)
    encoded: list[Encoded] = []
    done = 0
    for batch in _batches(documents):
        found = tokenizer.encode_batch([document.text for document in batch])
        encoded.extend(Encoded(d, np.array(ids, dtype=np.int64)) for d, ids in zip(batch, found, strict=True))
        done += sum(len(document.text) for document in batch)
        report(
            say(
                "encoding the text: {share:.0%} of {size:.1f} M characters",
                share=done / total,
                size=total / 1e6,
            )
        )
    return encoded


def _batches(documents: Sequence[Document]) -> Iterator[Sequence[Document]]:
    start, size = 0, 0
    for index, document in enumerate(documents):
        size += len(document.text)
        if size >= BATCH_CHARACTERS or index == len(documents) - 1:
            yield documents[start : index + 1]
            start, size = index + 1, 0


def join(tokenizer: Tokenizer, encoded: Sequence[Encoded], *, held_out: bool) -> dict[str, TokenizedText]:
    """Concatenate the documents of one side by domain; a domain that has none there gets empty arrays."""
    members: dict[str, list[Encoded]] = {item.document.domain: [] for item in encoded}
    for item in encoded:
        if item.document.held_out == held_out:
            members[item.document.domain].append(item)
    return {domain: _join_domain(tokenizer, items) for domain, items in sorted(members.items())}


def _join_domain(tokenizer: Tokenizer, items: Sequence[Encoded]) -> TokenizedText:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    opening = np.array([tokenizer.open_id], dtype=np.int64)
    ids_T = np.concatenate([opening[:0], *(part for item in items for part in (opening, item.ids_T))])
    lengths_N = np.array([len(item.ids_T) + 1 for item in items], dtype=np.int64)
    measured = [item for item in items if item.document.held_out]
    sizes = [tokenizer.source_sizes(item.document.text, item.ids_T.tolist()) for item in measured]
    labels = [label for item, of in zip(measured, sizes, strict=True) for label in _labels(item, of)]
    opened = [part for of in sizes for part in (np.zeros(1, dtype=np.int64), of)]
    return TokenizedText(
        ids_T=ids_T.astype(dtype),
        starts_N=np.cumsum(lengths_N) - lengths_N,
        syntax_T=np.concatenate([np.zeros(0, dtype=np.int8), *labels]),
        sizes_T=np.concatenate([np.zeros(0, dtype=np.int64), *opened]).astype(np.uint32),
        byte_count=sum(len(item.document.text.encode()) for item in items),
    )


def _labels(item: Encoded, sizes_T: NDArray[np.int64]) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Return the label of the opening token and those of the document's tokens."""
    opening = np.full(1, UNKNOWN, dtype=np.int8)
    if not item.document.name.removesuffix(TAIL).endswith(".py"):
        return opening, np.full(len(item.ids_T), UNKNOWN, dtype=np.int8)
    return opening, label_tokens(item.document.text, sizes_T)


def arrays(text: TokenizedText) -> Mapping[str, NDArray[Any]]:
    """Return the arrays to be stored, by name."""
    return {"ids": text.ids_T, "starts": text.starts_N, "syntax": text.syntax_T, "sizes": text.sizes_T}
