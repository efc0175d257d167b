"""Documents to arrays of tokens, with offsets, byte counts and syntax labels.

Legend: T tokens, N documents of one domain on one side of the split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from consilium.data.documents import TAIL, Document
from consilium.data.syntax import UNKNOWN, label_tokens
from consilium.data.tokenizer import Tokenizer
from consilium.data.writing import Writer, Written

BATCH_CHARACTERS = 2**19
"""Text encoded at once."""
_BLOCK: Final = 2**20
"""Tokens looked at at once."""

Progress = Callable[[str], None]


@final
class Joined:
    """Arrays end to end, of which only what is asked for is read."""

    def __init__(self, arrays: Sequence[NDArray[Any]]) -> None:
        self._arrays = arrays
        self._ends = np.cumsum([len(array) for array in arrays])
        self.dtype = arrays[0].dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: slice | NDArray[np.int64]) -> NDArray[Any]:
        if isinstance(index, slice):
            return self[np.arange(*index.indices(len(self)))]
        of = np.searchsorted(self._ends, index, side="right")
        found = np.empty(index.shape, dtype=self.dtype)
        for number in np.unique(of).tolist():
            here = of == number
            array = self._arrays[number]
            found[here] = array[index[here] - (self._ends[number] - len(array))]
        return found


def joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any] | Joined:
    """One array as it is, several end to end without a copy."""
    filled = [array for array in arrays if len(array)]
    return Joined(filled) if len(filled) > 1 else (filled or list(arrays))[0]


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """The documents of one domain on one side, each the token that opens it and then its own."""

    ids_T: NDArray[np.unsignedinteger[Any]] | Joined
    """uint16, or uint32 for a vocabulary beyond it."""
    starts_N: NDArray[np.int64]
    """Index of the token that opens each document."""
    syntax_T: NDArray[np.int8] | Joined
    """Index into syntax.CLASSES, UNKNOWN where there is none; empty for training text, which needs none."""
    sizes_T: NDArray[np.uint32] | Joined
    """Bytes of the source behind each token, whose sum is ``byte_count``; empty for training text."""
    byte_count: int
    """Bytes of what is learned of the documents, in UTF-8, as they were before any tokenizer changed them."""
    learned_T: NDArray[np.bool_] | Joined
    """Which tokens a model is trained to write; empty where it is all of them."""

    @property
    def token_count(self) -> int:
        return len(self.ids_T)

    @property
    def ends_N(self) -> NDArray[np.int64]:
        return np.append(self.starts_N[1:], self.token_count) if len(self.starts_N) else self.starts_N

    @property
    def is_learned(self) -> bool:
        """Whether a model is trained to write any of it."""
        if not len(self.learned_T):
            return self.token_count > len(self.starts_N)
        for first in range(0, self.token_count, _BLOCK):
            place_T = np.arange(first, min(first + _BLOCK, self.token_count))
            opens = np.searchsorted(self.starts_N, (place_T[0], place_T[-1] + 1))
            if self.learned(place_T).sum() > opens[1] - opens[0]:
                return True
        return False

    def learned(self, place_T: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the tokens at ``place_T`` are learned; what opens a document is not for it to say."""
        return self.learned_T[place_T] if len(self.learned_T) else np.ones(place_T.shape, dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class Encoded:
    document: Document
    written: Written


def encode_documents(writer: Writer, documents: Iterable[Document]) -> Iterator[list[Encoded]]:
    """Yield the documents of about ``BATCH_CHARACTERS`` at a time."""
    for batch in batches(documents):
        measured = any(document.held_out for document in batch)
        found = writer.write([document.content for document in batch], measured=measured)
        yield [Encoded(*pair) for pair in zip(batch, found, strict=True)]


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents of one side, so that only those that are measured have their bytes counted."""
    waiting: list[Document] = []
    size = 0
    for document in documents:
        if waiting and (waiting[0].held_out != document.held_out or size >= BATCH_CHARACTERS):
            yield waiting
            waiting, size = [], 0
        waiting.append(document)
        size += len(document.text)
    if waiting:
        yield waiting


def join(tokenizer: Tokenizer, encoded: Sequence[Encoded], *, held_out: bool) -> dict[str, TokenizedText]:
    """Concatenate the documents of one side by domain; a domain that has none there gets empty arrays."""
    members: dict[str, list[Encoded]] = {item.document.domain: [] for item in encoded}
    for item in encoded:
        if item.document.held_out == held_out:
            members[item.document.domain].append(item)
    return {domain: _join_domain(tokenizer, items) for domain, items in sorted(members.items())}


def id_type(tokenizer: Tokenizer) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def _join_domain(tokenizer: Tokenizer, items: Sequence[Encoded]) -> TokenizedText:
    opening = np.array([tokenizer.open_id], dtype=id_type(tokenizer))
    ids = [np.array(item.written.ids, dtype=opening.dtype) for item in items]
    lengths_N = np.array([len(part) + 1 for part in ids], dtype=np.int64)
    measured = [item for item in items if item.document.held_out]
    return TokenizedText(
        ids_T=_opened(opening, ids),
        starts_N=np.cumsum(lengths_N) - lengths_N,
        syntax_T=_opened(np.full(1, UNKNOWN, dtype=np.int8), map(_labels, measured)),
        sizes_T=_opened(np.zeros(1, dtype=np.uint32), map(_sizes, measured)),
        byte_count=sum(_bytes(item) for item in items),
        learned_T=_opened(np.ones(1, dtype=np.bool_), _masks(items)),
    )


def _opened(opening: NDArray[Any], parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([opening[:0], *(piece for part in parts for piece in (opening, part))])


def _masks(items: Sequence[Encoded]) -> list[NDArray[np.bool_]]:
    if all(item.written.learned is None for item in items):
        return []
    return [
        np.ones(len(item.written.ids), dtype=np.bool_)
        if item.written.learned is None
        else np.array(item.written.learned, dtype=np.bool_)
        for item in items
    ]


def _sizes(item: Encoded) -> NDArray[np.uint32]:
    assert item.written.sizes is not None, "bytes of a measured document are counted"
    return np.array(item.written.sizes, dtype=np.uint32)


def _bytes(item: Encoded) -> int:
    """Of training text of other forms nobody asks."""
    if item.written.sizes is not None:
        return sum(item.written.sizes)
    return len(item.document.content.encode()) if isinstance(item.document.content, str) else 0


def _labels(item: Encoded) -> NDArray[np.int8]:
    content = item.document.content
    if not isinstance(content, str) or not item.document.name.removesuffix(TAIL).endswith(".py"):
        return np.full(len(item.written.ids), UNKNOWN, dtype=np.int8)
    return label_tokens(content, _sizes(item).astype(np.int64))
