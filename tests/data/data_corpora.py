"""Small corpora that need neither the disk nor seconds."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from consilium.data.corpus import Corpus
from consilium.data.documents import Document
from consilium.data.encoding import encode_documents, join
from consilium.data.tokenizer import Tokenizer
from consilium.data.writing import Writer

CODE = "def area(width, height):\n    # rectangle\n    return width * height + 1.5\n\n\nname = 'größe'\n"
PROSE = "The quick brown fox jumps over the lazy dog. 你好，世界。\n"

BYTES = Tokenizer.of_bytes()

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)
"""Bytes of each document of one domain."""


def documents(sizes: Sequence[int], domain: str = "prose", *, held_out: bool = False) -> list[Document]:
    """Documents of ``sizes`` letters, each with a letter of its own."""
    return [
        Document(chr(ord("A") + index) * size, domain, f"{domain} {index:03}", held_out)
        for index, size in enumerate(sizes)
    ]


def corpus_of(found: Sequence[Document], tokenizer: Tokenizer = BYTES) -> Corpus:
    encoded = [item for batch in encode_documents(Writer(tokenizer), found) for item in batch]
    train, held_out = (join(tokenizer, encoded, held_out=side) for side in (False, True))
    return Corpus(tokenizer, "0" * 64, train, held_out)
