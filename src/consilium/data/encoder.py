"""The part of a tokenizer.json that turns text into tokens, so that no text can become a marker.

The library gets a description of its own: without the markers, of which neither added tokens nor merges are
left, without truncation, padding and dropout, and with one added token more, which nobody can spell, in whose
place markers are put afterwards. Text is so cut, opened by a blank and merged as the whole tokenizer does it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Protocol, Self, final

import tokenizers

from consilium.data.splits import is_familiar
from consilium.errors import ConsiliumError
from consilium.machine.confined import Confined

_TO_LOAD, _TO_ENCODE = 1.0, 1.0
"""Seconds of CPU time for a foreign tokenizer, however small the file or the text."""
_BYTES_A_SECOND: Final = 400_000
_CHARACTERS_A_SECOND: Final = 20_000
"""Below any machine's speed: patterns of published tokenizers read millions of characters a second."""


class Encoder(Protocol):
    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text."""
        ...

    def ends(self, text: str) -> list[int]:
        """Return where in ``text``, in characters, what is behind each token ends."""
        ...


@dataclass(frozen=True, slots=True)
class Slot:
    """An added token that no text can spell; where it stands in a text a marker goes."""

    text: str
    id: int


def make_slot(size: int) -> Slot:
    """Return one beyond ``size`` tokens, another one at every call."""
    return Slot(f"\0{secrets.token_hex(16)}\0", size)


def encoder(description: Mapping[str, Any], markers: Collection[int], slot: Slot, where: str) -> Encoder:
    """Return what encodes as ``description`` says, without ``markers``.

    Rules that are not known here run in a process of their own, under a deadline. Raises ConsiliumError for a
    description that the library refuses.
    """
    plain = json.dumps(_plain(description, markers, slot), ensure_ascii=False)
    return InProcess.read(plain, where) if is_familiar(description) else Confine(plain, where)


def _plain(description: Mapping[str, Any], markers: Collection[int], slot: Slot) -> dict[str, Any]:
    model = description["model"]
    added = [token for token in description.get("added_tokens") or () if token["id"] not in markers]
    vocabulary = {token: i for token, i in model["vocab"].items() if i not in markers}
    merges = model["merges"]
    if len(vocabulary) < len(model["vocab"]):
        merges = list(_without(merges, model["vocab"].keys() - vocabulary.keys()))
    # The library numbers added tokens anew where its model does not have them.
    vocabulary |= {token["content"]: token["id"] for token in added if token["content"] not in vocabulary}
    unknown = model.get("unk_token")
    if unknown is not None and unknown not in vocabulary:
        unknown = slot.text + "unknown"  # no text spells it, and what has no token still gets its id
        vocabulary[unknown] = model["vocab"][model["unk_token"]]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [*added, _added(slot)],
        "normalizer": description.get("normalizer"),
        "pre_tokenizer": description.get("pre_tokenizer"),
        "post_processor": None,
        "decoder": None,
        "model": {
            **model,
            "dropout": None,
            "unk_token": unknown,
            "vocab": vocabulary | {slot.text: slot.id},
            "merges": merges,
        },
    }


def _without(merges: Sequence[Any], tokens: Collection[str]) -> Iterator[Any]:
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left not in tokens and right not in tokens and left + right not in tokens:
            yield merge


def _added(slot: Slot) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": slot.id, "content": slot.text, "special": True, **flags}


@final
class InProcess:
    """Rules that are known here."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def read(cls, description: str, where: str) -> Self:
        try:
            return cls(tokenizers.Tokenizer.from_str(description))
        except BaseException as error:
            # A panic of the library, which no class of its own names, is no Exception.
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise damaged(where, error) from None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def ends(self, text: str) -> list[int]:
        return [end for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]


@final
class Confine:
    """Rules from outside, such as a pattern that backtracks for ever: in a process that a deadline ends."""

    def __init__(self, description: str, where: str) -> None:
        self._description, self._where = description, where
        self._process = self._load()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self._ask({"texts": list(texts)}, sum(map(len, texts)))

    def ends(self, text: str) -> list[int]:
        return self._ask({"ends": text}, len(text))

    def _load(self) -> Confined:
        process = Confined(__name__)
        try:
            seconds = _TO_LOAD + len(self._description) / _BYTES_A_SECOND
            process.ask({"description": self._description}, seconds=seconds)
        except TimeoutError:
            raise self._late("a tokenizer of its size needs") from None
        except RuntimeError as error:
            raise damaged(self._where, error) from None
        return process

    def _ask(self, request: Mapping[str, object], characters: int) -> Any:
        try:
            return self._process.ask(request, seconds=_TO_ENCODE + characters / _CHARACTERS_A_SECOND)
        except TimeoutError:
            self._process = self._load()
            raise self._late(f"a text of {characters:,} characters needs") from None
        except RuntimeError as error:
            self._process.close()
            self._process = self._load()
            raise ConsiliumError(
                f"{self._where} cannot encode this text ({_short(error)}); use another tokenizer."
            ) from None

    def _late(self, what: str) -> ConsiliumError:
        return ConsiliumError(
            f"{self._where}: its patterns take far longer than {what}, so it was stopped; use another"
            " tokenizer."
        )


@final
class _Work:
    """What runs there."""

    def __init__(self) -> None:
        self._encoder: InProcess | None = None

    def answer(self, request: Mapping[str, Any]) -> object:
        if "description" in request:
            self._encoder = InProcess.read(request["description"], "tokenizer")
            return None
        assert self._encoder is not None
        return (
            self._encoder.ids(request["texts"]) if "texts" in request else self._encoder.ends(request["ends"])
        )


def start() -> _Work:
    return _Work()


def source_sizes(text: str, ends: Sequence[int]) -> list[int]:
    """Return the bytes of ``text`` behind each token, whose sum is that of ``text``.

    Tokens that share a character leave it to the first of them; what no token ends with goes to the last.
    """
    borders, place = [0], 0
    for end in ends:
        place = min(max(place, end), len(text))
        borders.append(place)
    if ends:
        borders[-1] = len(text)
    return [len(text[start:end].encode()) for start, end in pairwise(borders)]


def damaged(where: str, error: BaseException) -> ConsiliumError:
    return ConsiliumError(f"{where} is not a tokenizer ({_short(error)}); copy it again from its source.")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
