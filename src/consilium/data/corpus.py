"""Tokenized text by domain and side, built once and then read from the cache."""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import json
import shutil
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, assert_never, final

import tokenizers

from consilium.config.data import Data
from consilium.config.training import Bytes, Folder, StartTokenizer, Train
from consilium.data.documents import Document, Text
from consilium.data.encoding import Encoded, Progress, TokenizedText, encode_documents, join
from consilium.data.library import Library
from consilium.data.mixture import Owners
from consilium.data.paths import path_texts
from consilium.data.shards import Shard, ShardWriter, join_shards, read_shard
from consilium.data.store import commit_entry, entry_is_whole, write_entry
from consilium.data.survey import Digest
from consilium.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from consilium.data.writing import Writer
from consilium.disk.files import cache_folder
from consilium.errors import ConsiliumError
from consilium.records.dropped import Dropped
from consilium.words.say import say
from consilium.words.seldom import Seldom

FORMAT: Final = 5
"""Version of a cache entry; changes when the same text would be tokenized or stored in another way."""


@final
class Aside:
    """A folder that is gone with this object, or with the process."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="consilium-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


@final
@dataclass(frozen=True, slots=True)
class Corpus:
    """Text by domain, with the tokenizer that was trained on its training side alone."""

    tokenizer: Tokenizer
    sha256: str
    """Hash of the texts and of their split."""
    train: Mapping[str, TokenizedText]
    """By domain; empty where the text is only measured."""
    held_out: Mapping[str, TokenizedText]
    owners: Owners = field(default_factory=dict)
    """Which sources each domain comes from."""
    dropped: tuple[Dropped, ...] = ()
    """What the filters took out."""
    aside: Aside | None = None
    """Where its files are when there is no cache: they go with it."""

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.held_out)


def build_corpus(
    data: Data, vocab_size: int, *, start: StartTokenizer = Train(), progress: Progress | None = None
) -> Corpus:
    """Read the text of ``data``, train or load the tokenizer and encode, or take all from the cache.

    ``vocab_size`` is the most that the tokenizer may use; bytes need 259. Memory does not grow with the text.
    Raises ConsiliumError for unusable text and for a tokenizer that has more.
    """
    report = progress or _silent
    tokenizer = _given(start, vocab_size)
    library = Library.open(data, report)
    _tell_dropped(library, report)
    _refuse_unmeasured(library)
    tokenizer = tokenizer or _trained(library, vocab_size, report)
    shards, aside = _shards(library, tokenizer, report)
    return Corpus(
        tokenizer,
        library.sha256,
        join_shards(shards, "train"),
        join_shards(shards, "held_out"),
        library.owners,
        library.dropped,
        aside,
    )


def _tell_dropped(library: Library, report: Progress) -> None:
    for kind, count in collections.Counter(one.filter for one in library.dropped).items():
        report(say("{count:,} texts are dropped by the {kind} filter", count=count, kind=kind))


def _trained(library: Library, vocab_size: int, report: Progress) -> Tokenizer:
    """BPE of a sample of what is not held out: the same number of characters of each domain."""
    settings = [FORMAT, library.sha256, vocab_size, tokenizers.__version__]
    folder = cache_folder() / "tokenizers" / _hash(settings)
    if entry_is_whole(folder):
        return Tokenizer.load(folder)
    report(say("training a tokenizer of {n} tokens", n=vocab_size))
    tokenizer = Tokenizer.train(library.sample(), vocab_size, progress=report)
    _keep_tokenizer(tokenizer, folder)
    return tokenizer


def _keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Whoever cannot write the cache trains it again, and hears of it when the tokens come."""
    try:
        write_entry(folder, tokenizer.files())
    except ConsiliumError:
        return


def _shards(library: Library, tokenizer: Tokenizer, report: Progress) -> tuple[list[Shard], Aside | None]:
    """The tokens of every shelf, from the cache or encoded into it; where it cannot be written, beside it."""
    job = _Job(library, tokenizer, report)
    folders = [cache_folder() / "shards" / job.key(shelf) for shelf in range(len(library.shelves))]
    missing = [shelf for shelf, folder in enumerate(folders) if not entry_is_whole(folder)]
    if not missing:
        report(say("tokenized text from the cache ({folder})", folder=cache_folder()))
    aside: Aside | None = None
    for shelf in missing:
        try:
            commit_entry(folders[shelf], functools.partial(job.write, shelf))
        except ConsiliumError as error:
            report(
                say(
                    "the cache cannot be written, so the next run tokenizes again: {sentence}", sentence=error
                )
            )
            aside = aside or Aside()
            folders[shelf] = aside.folder / str(shelf)
            folders[shelf].mkdir()
            job.write(shelf, folders[shelf])
    return [read_shard(folder) for folder in folders], aside


@final
class _Job:
    """Encodes shelves, and tells how far it is."""

    def __init__(self, library: Library, tokenizer: Tokenizer, report: Progress) -> None:
        self._library, self._report = library, Seldom(report)
        self._writer = Writer(tokenizer)
        self._done = 0

    def key(self, shelf: int) -> str:
        """Hash everything that decides the tokens; syntax labels depend on the version of Python."""
        found, kept_N = self._library.surveys[shelf], self._library.kept[shelf]
        split = hashlib.sha256(kept_N.astype("<i8").tobytes()).hexdigest()
        template = "" if self._writer.template is None else self._writer.template.source
        made = [fingerprint(self._writer.tokenizer), template, tokenizers.__version__, sys.version_info[:2]]
        return _hash([FORMAT, found.sha256, split, made])

    def write(self, shelf: int, folder: Path) -> None:
        """Fill ``folder`` with the shard of a shelf."""
        found = self._library.surveys[shelf]
        masked = not bool(found.plain_N.all())
        shard = ShardWriter(folder, self._writer.tokenizer, sorted(found.domains))
        total = max(self._library.characters, 1)
        for encoded in encode_documents(self._writer, self._library.documents(shelf)):
            shard.add(encoded, masked=masked)
            self._done += sum(len(item.document.text) for item in encoded)
            self._report(
                say(
                    "encoding the text: {share:.0%} of {size:.1f} M characters",
                    share=self._done / total,
                    size=total / 1e6,
                )
            )
        shard.finish()
        self._writer.close()


def _hash(settings: object) -> str:
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def whole_corpus(path: Path, tokenizer: Tokenizer, *, progress: Progress | None = None) -> Corpus:
    """Encode all text of ``path`` to measure a model on. Raises ConsiliumError for unusable text."""
    report = progress or _silent
    return measured_corpus(whole_documents(path_texts(path, report)), tokenizer, progress=report)


def whole_documents(texts: Sequence[Text]) -> list[Document]:
    """Return all ``texts`` as documents to measure on."""
    return [Document(text.content, text.domain, text.name, held_out=True) for text in texts]


def held_out_corpus(data: Data, tokenizer: Tokenizer, *, progress: Progress | None = None) -> Corpus:
    """Encode what a run on ``data`` holds out."""
    report = progress or _silent
    return measured_corpus(Library.open(data, report).all_documents(held_out=True), tokenizer)


def measured_corpus(
    documents: Sequence[Document], tokenizer: Tokenizer, *, progress: Progress | None = None
) -> Corpus:
    """Encode documents that are all held out."""
    report = Seldom(progress or _silent)
    digest, encoded, done = Digest(), list[Encoded](), 0
    with contextlib.closing(Writer(tokenizer)) as writer:
        for batch in encode_documents(writer, documents):
            encoded += batch
            done += len(batch)
            report(say("encoding the text: {done} of {count} documents", done=done, count=len(documents)))
    for document in documents:
        digest.add(Text(document.content, document.domain, document.name, document.name))
    return Corpus(tokenizer, digest.hexdigest(), {}, join(tokenizer, encoded, held_out=True))


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


def _refuse_unmeasured(library: Library) -> None:
    """A run is judged by text that it has not seen."""
    if library.held_out_characters == 0:
        raise ConsiliumError(
            f"data: nothing can be held out of {library.characters:,} characters, and a run is measured on"
            " text that it has not seen; give more text, or raise data.held_out."
        )


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the files of ``tokenizer``."""
    files = sorted(tokenizer.files().items())
    return hashlib.sha256(b"".join(name.encode() + b"\0" + content for name, content in files)).hexdigest()
