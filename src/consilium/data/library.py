"""The text of a run: surveyed, split, and read again only where tokens are still to be made of it.

Legend: N texts of a shelf.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from consilium.config.data import BuiltIn, Data, Filter, Source, TextPath, spelled
from consilium.data.bpe import sample
from consilium.data.builtin.domains import builtin_texts
from consilium.data.documents import Document, Text, TextMeasures, cut, split_domain, stable_fraction
from consilium.data.encoding import Progress
from consilium.data.mixture import Owners
from consilium.data.paths import Found, empty, found_files, path_texts
from consilium.data.reading import read_texts
from consilium.data.survey import Digest, Shelf, Survey, survey
from consilium.errors import ConsiliumError
from consilium.records.dropped import Dropped
from consilium.words.say import say
from consilium.words.seldom import Seldom

_LARGE: Final = 2**23
"""Bytes of a file that is a shelf of its own."""
_MOST: Final = 16
"""Shelves of small files, so that one that changes has few others encoded again with it."""


def _silent(_: str) -> None:
    return


@final
@dataclass(frozen=True, slots=True)
class Library:
    shelves: tuple[Shelf, ...]
    surveys: tuple[Survey, ...]
    kept: tuple[NDArray[np.int64], ...]
    """Of each shelf how many characters of each text train, from its beginning; the rest is held out."""

    @staticmethod
    def open(data: Data, report: Progress = _silent) -> Library:
        """Survey and split the text of ``data``. Raises ConsiliumError for unusable text."""
        shelves = tuple(_shelves(data, report))
        surveys = tuple(_surveyed(shelves, data.filters, report))
        kept = [np.zeros(0, dtype=np.int64)] * len(shelves)
        for index, source in enumerate(data.sources):
            own = [place for place, shelf in enumerate(shelves) if shelf.source == index]
            if not any(len(surveys[place].domain_N) for place in own):
                raise _nothing(source, filtered=any(surveys[place].dropped for place in own))
            parts = _split([surveys[place] for place in own], data.held_out)
            for place, part in zip(own, parts, strict=True):
                kept[place] = part
        return Library(shelves, surveys, tuple(kept))

    @property
    def sha256(self) -> str:
        """Hash of all texts and of their split."""
        digest = hashlib.sha256()
        for found, kept in zip(self.surveys, self.kept, strict=True):
            digest.update(bytes.fromhex(found.sha256))
            digest.update(kept.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def owners(self) -> Owners:
        """Which sources each domain comes from."""
        owners: dict[str, list[int]] = {}
        for shelf, found in zip(self.shelves, self.surveys, strict=True):
            for domain in found.domains:
                of = owners.setdefault(domain, [])
                of += [] if shelf.source in of else [shelf.source]
        return owners

    @property
    def characters(self) -> int:
        return sum(int(found.characters_N.sum()) for found in self.surveys)

    @property
    def held_out_characters(self) -> int:
        return self.characters - sum(int(kept.sum()) for kept in self.kept)

    @property
    def dropped(self) -> tuple[Dropped, ...]:
        """What the filters took out."""
        return tuple(one for found in self.surveys for one in found.dropped.values())

    def _texts(self, shelf: int) -> Iterator[Text]:
        """Read those that no filter took out."""
        dropped = self.surveys[shelf].dropped
        return (text for place, text in enumerate(self.shelves[shelf].read()) if place not in dropped)

    def documents(self, shelf: int) -> Iterator[Document]:
        """Read the texts of a shelf again, and cut where one is on both sides.

        Raises ConsiliumError where they are others than when they were surveyed.
        """
        digest = Digest()
        kept = iter(self.kept[shelf].tolist())
        for text in self._texts(shelf):
            digest.add(text)
            yield from cut(text, next(kept, 0))
        if digest.hexdigest() != self.surveys[shelf].sha256:
            names = self.shelves[shelf].names
            raise ConsiliumError(
                f"data: the text changed while it was read ({names[0] if names else 'built-in'}); run again"
                " once it stays as it is."
            )

    def sample(self) -> Iterator[str]:
        """Yield what a tokenizer is trained on: of each domain the same number of characters that train."""
        names = sorted(self.owners)
        domain_N = np.concatenate(
            [
                np.array([names.index(name) for name in f.domains], dtype=np.int64)[f.domain_N]
                for f in self.surveys
            ]
        )
        kept_N, order_N = np.concatenate(self.kept), np.concatenate([f.order_N for f in self.surveys])
        masks = {name: domain_N == i for i, name in enumerate(names)}
        drawn = sample({n: kept_N[m] for n, m in masks.items()}, {n: order_N[m] for n, m in masks.items()})
        drawn_N = np.zeros_like(kept_N)
        for name, mask in masks.items():
            drawn_N[mask] = drawn[name]
        ends = np.cumsum([len(kept) for kept in self.kept])[:-1]
        for shelf, (kept, part_N) in enumerate(zip(self.kept, np.split(drawn_N, ends), strict=True)):
            if part_N.any():
                for text, size, count in zip(self._texts(shelf), kept.tolist(), part_N.tolist(), strict=True):
                    yield cut(text, size)[0].text[:count]

    def all_documents(self, *, held_out: bool | None = None) -> list[Document]:
        """Return the documents of one side, or of both, sorted by domain and name."""
        found = [document for shelf in range(len(self.shelves)) for document in self.documents(shelf)]
        chosen = [document for document in found if held_out in (None, document.held_out)]
        return sorted(chosen, key=lambda document: (document.domain, document.name))


def _nothing(source: Source, *, filtered: bool) -> ConsiliumError:
    if filtered:
        return ConsiliumError(
            f"data: the filters drop every text of {spelled(source)}; lower data.filters.0.least or take the"
            " filter out."
        )
    return empty(Path(source.path if isinstance(source, TextPath) else spelled(source)))


def _surveyed(shelves: Sequence[Shelf], filters: Sequence[Filter], report: Progress) -> Iterator[Survey]:
    far = Seldom(report)
    for number, shelf in enumerate(shelves, start=1):
        yield survey(shelf, filters)
        if len(shelves) > 1:
            far(say("reading the text: {number} of {count}", number=number, count=len(shelves)))


def _split(surveys: Sequence[Survey], fraction: float) -> list[NDArray[np.int64]]:
    """Each domain of a source by itself, so that no source moves another's text."""
    kept = [np.zeros(len(found.domain_N), dtype=np.int64) for found in surveys]
    for domain in sorted({domain for found in surveys for domain in found.domains}):
        own = [
            found.domain_N == (found.domains.index(domain) if domain in found.domains else -1)
            for found in surveys
        ]
        measures = TextMeasures(
            *(
                np.concatenate([getattr(f, name)[mask] for f, mask in zip(surveys, own, strict=True)])
                for name in ("unit_N", "characters_N", "plain_N")
            )
        )
        parts = np.split(split_domain(measures, fraction), np.cumsum([mask.sum() for mask in own])[:-1])
        for part, mask, into in zip(parts, own, kept, strict=True):
            into[mask] = part
    return kept


def _shelves(data: Data, report: Progress) -> Iterator[Shelf]:
    paths = [Path(source.path) for source in data.sources if isinstance(source, TextPath)]
    refuse_twice(paths)
    prefixes = _prefixes(paths) if len(data.sources) > 1 else [""] * len(paths)
    named = [
        (prefixes.pop(0) if isinstance(source, TextPath) else "", i) for i, source in enumerate(data.sources)
    ]
    # By what sources are called, so that their order in the configuration changes nothing.
    for prefix, index in sorted(named):
        yield from _of_source(data.sources[index], index, prefix, report)


def source_texts(source: TextPath, report: Progress) -> list[Text]:
    """Read all text of one source into memory. Raises ConsiliumError for unusable text."""
    texts = path_texts(Path(source.path), report)
    return texts if source.domain is None else [dataclasses.replace(t, domain=source.domain) for t in texts]


def _of_source(source: Source, index: int, prefix: str, report: Progress) -> Iterator[Shelf]:
    match source:
        case BuiltIn():
            texts = tuple(builtin_texts())
            yield Shelf(lambda: iter(texts), (), (), index)
        case TextPath(path=path, domain=domain):
            for files in _grouped(found_files(Path(path), report)):
                yield Shelf(
                    functools.partial(_read, files, prefix, domain),
                    tuple(file.path for file in files),
                    (*(file.name for file in files), prefix, domain or ""),
                    index,
                )


def _read(files: Sequence[Found], prefix: str, domain: str | None) -> Iterator[Text]:
    for file in files:
        for text in read_texts(file.path, file.name, file.domain):
            if text.text.strip():
                # The unit, which decides the split, keeps its name inside the source.
                yield dataclasses.replace(text, name=prefix + text.name, domain=domain or text.domain)


def _grouped(files: Sequence[Found]) -> Iterator[tuple[Found, ...]]:
    """Large files alone, small ones by the hash of their names in as many groups as their size asks for."""
    sizes = {file.name: file.path.stat().st_size for file in files}
    small = [file for file in files if sizes[file.name] < _LARGE]
    wanted = -(-sum(sizes[file.name] for file in small) // (2 * _LARGE))
    count = min(_MOST, 1 << max(wanted - 1, 0).bit_length())
    groups: list[list[Found]] = [[] for _ in range(count)]
    for file in small:
        groups[int(stable_fraction(file.name, salt="shelf") * count)].append(file)
    yield from (tuple(group) for group in groups if group)
    yield from ((file,) for file in files if sizes[file.name] >= _LARGE)


def refuse_twice(paths: Sequence[Path]) -> None:
    """Raise ConsiliumError for text named twice: it would be trained on and held out at once."""
    for i, path in enumerate(paths):
        for other in paths[i + 1 :]:
            one, two = path.resolve(), other.resolve()
            if one.is_relative_to(two) or two.is_relative_to(one):
                raise ConsiliumError(
                    f"data: {path} and {other} are or hold the same files; name each text once."
                )


def _prefixes(paths: Sequence[Path]) -> list[str]:
    """What names begin with beside other sources: the shortest ends of the paths that tell them apart.

    However a path was written, from wherever, and wherever the folder lies, its end is the same.
    """
    parts = [path.resolve().parts for path in paths]
    longest = max(map(len, parts), default=0)
    ends = ([of[-size:] for of in parts] for size in range(1, longest + 1))
    told_apart = next((end for end in ends if len(set(end)) == len(paths)), parts)
    return [f"{'/'.join(end)}:" for end in told_apart]
