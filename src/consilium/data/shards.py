"""Tokenized text on disk: written as it is encoded, mapped into memory when it is read.

A shard is a folder with an index and, for each domain and side, one file an array.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from consilium.data.encoding import Encoded, TokenizedText, id_type, join, joined
from consilium.data.tokenizer import Tokenizer
from consilium.disk.files import DISK, Filesystem

INDEX: Final = "index.json"
SIDES: Final = ("train", "held_out")
_TYPES: Final[Mapping[str, type[Any]]] = {
    "starts": np.int64,
    "syntax": np.int8,
    "sizes": np.uint32,
    "learned": np.bool_,
}


@final
class ShardWriter:
    """Appends batches to the files of a shard. ``finish`` writes the index, without which it is none."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, domains: Sequence[str], *, files: Filesystem = DISK
    ) -> None:
        self._folder, self._tokenizer, self._files = folder, tokenizer, files
        self._domains = list(domains)
        self._tokens = {side: [0] * len(domains) for side in SIDES}
        self._bytes = {side: [0] * len(domains) for side in SIDES}
        self._made: set[Path] = set()

    def add(self, encoded: Sequence[Encoded], *, masked: bool) -> None:
        """``masked``: some document of the shard has tokens that are not learned."""
        for side in SIDES:
            for domain, text in join(self._tokenizer, encoded, held_out=side == "held_out").items():
                if text.token_count:
                    self._add(side, self._domains.index(domain), text, masked=masked)

    def _add(self, side: str, number: int, text: TokenizedText, *, masked: bool) -> None:
        learned_T = text.learned(np.arange(text.token_count)) if masked else text.learned_T
        arrays = {
            "ids": text.ids_T,
            "starts": text.starts_N + self._tokens[side][number],
            "syntax": text.syntax_T,
            "sizes": text.sizes_T,
            "learned": learned_T,
        }
        for name, array in arrays.items():
            if len(array):
                self._append(self._folder / f"{side}-{number}-{name}.bin", np.asarray(array))
        self._tokens[side][number] += text.token_count
        self._bytes[side][number] += text.byte_count

    def _append(self, path: Path, array: NDArray[Any]) -> None:
        if path not in self._made:
            self._files.write(path, [])
            self._made.add(path)
        self._files.append(path, array.tobytes())

    def finish(self) -> None:
        index = {
            "domains": self._domains,
            "dtype": np.dtype(id_type(self._tokenizer)).name,
            "bytes": self._bytes,
        }
        self._files.write(self._folder / INDEX, [json.dumps(index).encode()])


@dataclass(frozen=True, slots=True)
class Shard:
    """Sides, then domains."""

    texts: Mapping[str, Mapping[str, TokenizedText]]


def read_shard(folder: Path) -> Shard:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return Shard(
        {
            side: {
                domain: _text(folder, f"{side}-{number}", index["dtype"], index["bytes"][side][number])
                for number, domain in enumerate(index["domains"])
            }
            for side in SIDES
        }
    )


def _text(folder: Path, prefix: str, dtype: str, byte_count: int) -> TokenizedText:
    def mapped(name: str) -> NDArray[Any]:
        path, kind = folder / f"{prefix}-{name}.bin", np.dtype(_TYPES.get(name, dtype))
        return np.memmap(path, dtype=kind, mode="r") if path.exists() else np.zeros(0, dtype=kind)

    return TokenizedText(
        ids_T=mapped("ids"),
        starts_N=mapped("starts"),
        syntax_T=mapped("syntax"),
        sizes_T=mapped("sizes"),
        byte_count=byte_count,
        learned_T=mapped("learned"),
    )


def join_shards(shards: Iterable[Shard], side: str) -> dict[str, TokenizedText]:
    """Return the text of each domain over all shards, none of it copied but the places of documents."""
    members: dict[str, list[TokenizedText]] = {}
    for shard in shards:
        for domain, text in shard.texts[side].items():
            members.setdefault(domain, []).append(text)
    return {domain: _joined(texts) for domain, texts in sorted(members.items())}


def _joined(texts: Sequence[TokenizedText]) -> TokenizedText:
    if len(texts) == 1:
        return texts[0]
    counts = [text.token_count for text in texts]
    firsts = np.cumsum(counts) - counts
    masked = any(len(text.learned_T) for text in texts)
    learned = [text.learned(np.arange(text.token_count)) for text in texts] if masked else []
    return TokenizedText(
        ids_T=joined([np.asarray(text.ids_T) for text in texts]),
        starts_N=np.concatenate([text.starts_N + first for text, first in zip(texts, firsts, strict=True)]),
        syntax_T=joined([np.asarray(text.syntax_T) for text in texts]),
        sizes_T=joined([np.asarray(text.sizes_T) for text in texts]),
        byte_count=sum(text.byte_count for text in texts),
        learned_T=joined(learned) if masked else np.zeros(0, dtype=np.bool_),
    )
