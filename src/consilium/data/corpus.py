"""Tokenized text by domain and side, built once and then read from the cache."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, assert_never, final

import tokenizers

from consilium.config.data import BuiltIn, Data, Source, TextPath
from consilium.config.training import Bytes, Folder, StartTokenizer, Train
from consilium.data.builtin.domains import builtin_documents
from consilium.data.documents import Document, Text, corpus_sha256, split
from consilium.data.encoding import Progress, TokenizedText, arrays, encode_documents, join
from consilium.data.mixture import Owners
from consilium.data.paths import path_texts
from consilium.data.store import array_bytes, cache_folder, entry_is_whole, open_array, write_entry
from consilium.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from consilium.errors import ConsiliumError
from consilium.words.say import say

FORMAT = 3
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
    owners: Owners = field(default_factory=dict)
    """Which sources each domain comes from."""

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.held_out)


def build_corpus(
    data: Data, vocab_size: int, *, start: StartTokenizer = Train(), progress: Progress | None = None
) -> Corpus:
    """Read the text of ``data``, train or load the tokenizer and encode, or take all from the cache.

    ``vocab_size`` is the most that the tokenizer may use; bytes need 259. Raises ConsiliumError for unusable
    text and for a tokenizer that has more.
    """
    report = progress or _silent
    tokenizer = _given(start, vocab_size)
    documents, owners = _read_sources(data, report)
    _refuse_unmeasured(documents)
    sha256 = corpus_sha256(documents)
    folder = cache_folder() / "corpus" / _key(start, tokenizer, vocab_size, sha256)
    if entry_is_whole(folder):
        report(say("tokenized text from the cache ({folder})", folder=folder))
        return replace(_read(folder), owners=owners)
    if tokenizer is None:
        report(say("training a tokenizer of {n} tokens", n=vocab_size))
        tokenizer = Tokenizer.train(documents, vocab_size, progress=report)
    corpus = replace(_tokenize(tokenizer, documents, report), owners=owners)
    try:
        write_entry(folder, _files(corpus))
    except ConsiliumError as error:
        report(
            say("the cache cannot be written, so the next run tokenizes again: {sentence}", sentence=error)
        )
    return corpus


def whole_corpus(path: Path, tokenizer: Tokenizer, *, progress: Progress | None = None) -> Corpus:
    """Encode all text of ``path`` to measure a model on. Raises ConsiliumError for unusable text."""
    report = progress or _silent
    return measured_corpus(whole_documents(path_texts(path, report)), tokenizer, progress=report)


def whole_documents(texts: Sequence[Text]) -> list[Document]:
    """Return all ``texts`` as documents to measure on."""
    return [Document(text.text, text.domain, text.name, held_out=True) for text in texts]


def held_out_corpus(data: Data, tokenizer: Tokenizer, *, progress: Progress | None = None) -> Corpus:
    """Encode what a run on ``data`` holds out."""
    report = progress or _silent
    held_out = [document for document in read_documents(data, report) if document.held_out]
    return measured_corpus(held_out, tokenizer, progress=report)


def measured_corpus(
    documents: Sequence[Document], tokenizer: Tokenizer, *, progress: Progress | None = None
) -> Corpus:
    """Encode documents that are all held out."""
    encoded = encode_documents(tokenizer, documents, progress or _silent)
    return Corpus(tokenizer, corpus_sha256(documents), {}, join(tokenizer, encoded, held_out=True))


def _silent(_: str) -> None:
    return


def _given(start: StartTokenizer, vocab_size: int) -> Tokenizer | None:
    """The tokenizer that ``start`` names, None where it is still to be trained."""
    match start:
        case Train():
            needed, found, name = SMALLEST_VOCABULARY, None, "a tokenizer that is trained here"
        case Bytes():
            needed, found, name = SMALLEST_VOCABULARY, Tokenizer.of_bytes(), "the tokenizer of bytes"
        case Folder(path=path):
            found = Tokenizer.load(Path(path))
            needed, name = found.vocab_size, f"the tokenizer of {path}"
        case unknown:
            assert_never(unknown)
    if vocab_size < needed:
        raise ConsiliumError(
            f"data: {name} has {needed} tokens or more and the model's vocabulary is {vocab_size}; set the"
            f" model's vocab_size to {needed} or more, or choose another tokenizer."
        )
    return found


def _refuse_unmeasured(documents: Sequence[Document]) -> None:
    """A run is judged by text that it has not seen."""
    if not any(document.held_out and document.text.strip() for document in documents):
        raise ConsiliumError(
            f"data: nothing can be held out of {sum(len(d.text) for d in documents):,} characters, and a run"
            " is measured on text that it has not seen; give more text, or raise data.held_out."
        )


def read_documents(data: Data, report: Progress | None = None) -> list[Document]:
    """Return the text of ``data`` with its split. Raises ConsiliumError for unusable text."""
    return _read_sources(data, report or _silent)[0]


def _read_sources(data: Data, report: Progress) -> tuple[list[Document], Owners]:
    """Return documents, sorted, and the sources that each domain comes from."""
    paths = [Path(source.path) for source in data.sources if isinstance(source, TextPath)]
    refuse_twice(paths)
    prefixes = _prefixes(paths) if len(data.sources) > 1 else [""] * len(paths)
    found: list[Document] = []
    owners: dict[str, list[int]] = {}
    for index, source in enumerate(data.sources):
        prefix = prefixes.pop(0) if isinstance(source, TextPath) else ""
        documents = _of(source, data.held_out, report, prefix)
        found += documents
        for domain in {document.domain for document in documents}:
            owners.setdefault(domain, []).append(index)
    return sorted(found, key=lambda document: (document.domain, document.name)), owners


def _of(source: Source, held_out: float, report: Progress, prefix: str) -> list[Document]:
    match source:
        case BuiltIn():
            return builtin_documents(held_out)
        case TextPath() as source:
            # The unit, which decides the split, keeps its name inside the source: no source moves another's.
            texts = [replace(text, name=prefix + text.name) for text in source_texts(source, report)]
            return split(texts, held_out)
        case unknown:
            assert_never(unknown)


def source_texts(source: TextPath, report: Progress | None = None) -> list[Text]:
    """Return the text of one source. Raises ConsiliumError for unusable text."""
    texts = path_texts(Path(source.path), report or _silent)
    return texts if source.domain is None else [replace(text, domain=source.domain) for text in texts]


def _prefixes(paths: Sequence[Path]) -> list[str]:
    """What names begin with beside other sources: the shortest ends of the paths that tell them apart.

    However a path was written, from wherever, and wherever the folder lies, its end is the same.
    """
    parts = [path.resolve().parts for path in paths]
    longest = max(map(len, parts), default=0)
    ends = ([of[-size:] for of in parts] for size in range(1, longest + 1))
    told_apart = next((end for end in ends if len(set(end)) == len(paths)), parts)
    return [f"{'/'.join(end)}:" for end in told_apart]


def refuse_twice(paths: Sequence[Path]) -> None:
    """Raise ConsiliumError for text named twice: it would be trained on and held out at once."""
    for i, path in enumerate(paths):
        for other in paths[i + 1 :]:
            one, two = path.resolve(), other.resolve()
            if one.is_relative_to(two) or two.is_relative_to(one):
                raise ConsiliumError(
                    f"data: {path} and {other} are or hold the same files; name each text once."
                )


def _key(start: StartTokenizer, tokenizer: Tokenizer | None, vocab_size: int, sha256: str) -> str:
    """Hash everything that decides an entry; syntax labels depend on the version of Python."""
    made = "" if tokenizer is None else fingerprint(tokenizer)
    settings = [FORMAT, sha256, start.kind, made, vocab_size, tokenizers.__version__, sys.version_info[:2]]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the files of ``tokenizer``."""
    files = sorted(tokenizer.files().items())
    return hashlib.sha256(b"".join(name.encode() + b"\0" + content for name, content in files)).hexdigest()


def _tokenize(tokenizer: Tokenizer, documents: Sequence[Document], report: Progress) -> Corpus:
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
    ids_T, starts_N, syntax_T, sizes_T = (
        open_array(folder / f"{prefix}-{name}.npy") for name in ("ids", "starts", "syntax", "sizes")
    )
    return TokenizedText(ids_T, starts_N, syntax_T, sizes_T, byte_count)
