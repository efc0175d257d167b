"""Tokenized text by domain and side, built once and then read from the cache."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never, final

import tokenizers

from consilium.config.training import BuiltIn, Data
from consilium.config.training import Path as PathSource
from consilium.data.builtin.domains import builtin_documents
from consilium.data.documents import Document, corpus_sha256, split
from consilium.data.encoding import Progress, TokenizedText, arrays, encode_documents, join
from consilium.data.paths import path_texts
from consilium.data.store import array_bytes, cache_folder, entry_is_whole, open_array, write_entry
from consilium.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from consilium.errors import ConsiliumError

FORMAT = 1
"""Version of a cache entry; changes when the same text would be tokenized or stored in another way."""
INDEX = "index.json"


@final
@dataclass(frozen=True, slots=True)
class Corpus:
    """Text by domain, with the tokenizer that was trained on its training side alone."""

    tokenizer: Tokenizer
    sha256: str
    """Hash of the documents and of their split."""
    train: Mapping[str, TokenizedText]
    """By domain; empty where the text is only measured."""
    held_out: Mapping[str, TokenizedText]

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.held_out)


def build_corpus(data: Data, vocab_size: int, *, progress: Progress | None = None) -> Corpus:
    """Read the text of ``data``, train the tokenizer and encode, or take the result from the cache.

    ``vocab_size`` is the most that BPE may use; bytes need 259. Raises ConsiliumError for unusable text.
    """
    report = progress or _silent
    _check_vocabulary(data, vocab_size)
    documents = _documents(data)
    sha256 = corpus_sha256(documents)
    folder = cache_folder() / "corpus" / _key(data, vocab_size, sha256)
    if entry_is_whole(folder):
        report(f"tokenized text from the cache ({folder})")
        return _read(folder)
    corpus = _tokenize(data, vocab_size, documents, report)
    try:
        write_entry(folder, _files(corpus))
    except OSError as error:
        report(f"the cache cannot be written, so the next run tokenizes again: {error}")
    return corpus


def whole_corpus(path: Path, tokenizer: Tokenizer) -> Corpus:
    """Encode all text of ``path`` to measure a model on. Raises ConsiliumError for unusable text."""
    return _measured([Document(t.text, t.domain, t.name, held_out=True) for t in path_texts(path)], tokenizer)


def held_out_corpus(data: Data, tokenizer: Tokenizer) -> Corpus:
    """Encode what a run on ``data`` holds out."""
    return _measured([document for document in _documents(data) if document.held_out], tokenizer)


def _measured(documents: Sequence[Document], tokenizer: Tokenizer) -> Corpus:
    encoded = encode_documents(tokenizer, documents, _silent)
    return Corpus(tokenizer, corpus_sha256(documents), {}, join(tokenizer, encoded, held_out=True))


def _silent(_: str) -> None:
    return


def _check_vocabulary(data: Data, vocab_size: int) -> None:
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConsiliumError(
            f"data: a vocabulary of {vocab_size} is too small for the {data.tokenizer} tokenizer; set the"
            f" model's vocab_size to {SMALLEST_VOCABULARY} or more."
        )


def _documents(data: Data) -> list[Document]:
    match data.source:
        case BuiltIn():
            return builtin_documents(data.held_out)
        case PathSource(path=path):
            return split(path_texts(Path(path)), data.held_out)
        case unknown:
            assert_never(unknown)


def _key(data: Data, vocab_size: int, sha256: str) -> str:
    """Hash everything that decides an entry; syntax labels depend on the version of Python."""
    settings = [FORMAT, sha256, data.tokenizer, vocab_size, tokenizers.__version__, sys.version_info[:2]]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _tokenize(data: Data, vocab_size: int, documents: Sequence[Document], report: Progress) -> Corpus:
    match data.tokenizer:
        case "bpe":
            report(f"training a tokenizer of {vocab_size} tokens")
            tokenizer = Tokenizer.train(documents, vocab_size)
        case "bytes":
            tokenizer = Tokenizer.of_bytes()
    encoded = encode_documents(tokenizer, documents, report)
    return Corpus(
        tokenizer=tokenizer,
        sha256=corpus_sha256(documents),
        train=join(tokenizer, encoded, held_out=False),
        held_out=join(tokenizer, encoded, held_out=True),
    )


def _files(corpus: Corpus) -> dict[str, bytes]:
    """Return the content of a cache entry. Files are numbered, since a domain's name may be no file name."""
    files = corpus.tokenizer.files()
    index: dict[str, Any] = {"sha256": corpus.sha256, "domains": list(corpus.domains)}
    for side, texts in (("train", corpus.train), ("held_out", corpus.held_out)):
        index[side] = [text.byte_count for text in texts.values()]
        for number, text in enumerate(texts.values()):
            files |= {
                f"{side}-{number}-{name}.npy": array_bytes(array) for name, array in arrays(text).items()
            }
    return files | {INDEX: json.dumps(index).encode()}


def _read(folder: Path) -> Corpus:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    sides = {
        side: {
            domain: _read_text(folder, f"{side}-{number}", byte_count)
            for number, (domain, byte_count) in enumerate(zip(index["domains"], index[side], strict=True))
        }
        for side in ("train", "held_out")
    }
    return Corpus(Tokenizer.load(folder), index["sha256"], sides["train"], sides["held_out"])


def _read_text(folder: Path, prefix: str, byte_count: int) -> TokenizedText:
    ids_T, starts_N, syntax_T = (
        open_array(folder / f"{prefix}-{name}.npy") for name in ("ids", "starts", "syntax")
    )
    return TokenizedText(ids_T, starts_N, syntax_T, byte_count)
