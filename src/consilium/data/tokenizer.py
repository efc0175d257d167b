"""Text to tokens and back: BPE, trained on the spot or read from a folder, and its streaming decoder.

Legend: V vocabulary.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self, final

import numpy as np
from numpy.typing import NDArray

from consilium.data.bpe import train_bpe
from consilium.data.encoder import damaged, encoder, make_slot, source_sizes
from consilium.data.gguf import tokenizer_files
from consilium.data.vocabulary import content_of, marker_ids, taken_blanks, template_opening, token_bytes
from consilium.errors import ConsiliumError
from consilium.records.run import newest_of_run

END = "<|endoftext|>"
SPECIALS = (END, "<|im_start|>", "<|im_end|>")
SMALLEST_VOCABULARY = 256 + len(SPECIALS)
LARGEST_FILE: Final = 64 * 2**20
"""Bytes of a tokenizer.json: twice the largest that is published."""
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
"""What reading JSON of another shape than expected ends in."""

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"


@final
class StreamDecoder:
    """Decodes token by token. Joined pieces equal the full decode; incomplete characters are held back."""

    def __init__(self, bytes_V: Sequence[bytes], *, drop: bytes = b"") -> None:
        """``drop`` is left out where the first bytes are those."""
        self._bytes_V = bytes_V
        self._drop = drop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes, which may be empty."""
        data = _bytes_of(self._bytes_V, token)
        if data:
            data, self._drop = data.removeprefix(self._drop), b""
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Return what was held back, as U+FFFD where the last character never became whole."""
        return self._decoder.decode(b"", final=True)


@final
class Tokenizer:
    """Text to token ids and back. No text encodes to a marker: roles, tools and ends are given as ids.

    ``opening_id`` is the token that opens a prompt, None where a model wants none. ``open_id`` opens a
    document: the same token, else ``eos_id``. In tokenizers trained here both are ``eos_id``, which so also
    closes the document before.
    """

    def __init__(self, description: str, config: Mapping[str, Any], *, where: str = "tokenizer") -> None:
        """``description`` and ``config`` are the contents of tokenizer.json and tokenizer_config.json.

        Raises ConsiliumError that begins with ``where`` for what is no tokenizer, or of a kind not read.
        """
        self._description = description
        self._config = dict(config)
        try:
            data = json.loads(description)
            self._bytes_V = token_bytes(data, where=where)
            self.markers: Mapping[str, int] = MappingProxyType(marker_ids(data, config))
            """The tokens that are no text, by what stands for them in a template."""
            self._ids = data["model"]["vocab"] | {
                t["content"]: t["id"] for t in data.get("added_tokens") or ()
            }
            self._slot = make_slot(len(self._bytes_V))
            self._encoder = encoder(data, frozenset(self.markers.values()), self._slot, where)
            self._before = template_opening(data)
            self._takes = taken_blanks(data)
        except ConsiliumError:
            raise
        except _MALFORMED as error:
            raise damaged(where, error) from None
        self.eos_id: int = self._find_end(where)
        self.opening_id: int | None = self._find_opening()
        first = self.decode_bytes(self.encode("a"))
        self._blank = first.removesuffix(b"a")
        """What the tokenizer puts before a text: a space or nothing."""

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, progress: Callable[[str], None] | None = None
    ) -> Self:
        """Train byte-level BPE (GPT-2's split) on ``texts``, all of which are read into memory.

        The same texts give the same tokenizer.json. A small text gives fewer tokens than ``vocab_size``.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise ConsiliumError(
                f"tokenizer: a vocabulary of {vocab_size} cannot hold 256 bytes and {len(SPECIALS)} special"
                f" tokens; use vocab_size {SMALLEST_VOCABULARY} or more."
            )
        report = progress or (lambda _: None)
        return cls(train_bpe(texts, vocab_size, SPECIALS, report), _own_config())

    @classmethod
    def of_bytes(cls) -> Self:
        """Return the tokenizer of 256 bytes and the special tokens: BPE without a single merge."""
        return cls.train((), SMALLEST_VOCABULARY)

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read the tokenizer of what ``cs.load`` accepts: a checkpoint, a run's newest one, a .gguf file.

        Raises ConsiliumError naming the file that is wrong.
        """
        folder = newest_of_run(folder, TOKENIZER_FILE)
        if folder.suffix == ".gguf":
            return cls(*tokenizer_files(folder), where=str(folder))
        description = _read(folder / TOKENIZER_FILE)
        text = _read(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else "{}"
        config = _object(text, folder / CONFIG_FILE)
        if (folder / TEMPLATE_FILE).exists():  # which wins, as in transformers
            config["chat_template"] = _read(folder / TEMPLATE_FILE)
        return cls(description, config, where=str(folder / TOKENIZER_FILE))

    def save(self, folder: Path) -> None:
        """Write the two files that ``load`` and transformers read."""
        for name, content in self.files().items():
            (folder / name).write_bytes(content)

    def files(self) -> dict[str, bytes]:
        """Return the contents of the two files by name, for writers that count bytes or make them safe."""
        config = json.dumps(self._config, indent=2, ensure_ascii=False) + "\n"
        return {TOKENIZER_FILE: self._description.encode(), CONFIG_FILE: config.encode()}

    @property
    def open_id(self) -> int:
        return self.eos_id if self.opening_id is None else self.opening_id

    @property
    def vocab_size(self) -> int:
        return len(self._bytes_V)

    @property
    def known_ids(self) -> frozenset[int]:
        """Ids that stand for something; a file may leave holes, and a model may have more."""
        return frozenset(self._ids.values())

    @property
    def sizes_V(self) -> NDArray[np.int64]:
        """Bytes of text behind each token."""
        return np.array([len(data) for data in self._bytes_V], dtype=np.int64)

    def encode(self, text: str) -> list[int]:
        """Encode text in which nothing is a marker. Raises ConsiliumError for half a surrogate pair."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode as ``encode`` does, in parallel."""
        return self._encoder.ids([_encodable(text) for text in texts])

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Encode text with markers in between, given by id, as one: no text of it becomes a marker.

        A marker takes the blanks along that the file says it does.
        """
        text = "".join(self._slot.text if isinstance(part, int) else _encodable(part) for part in parts)
        given = [part for part in parts if isinstance(part, int)]
        between = zip([None, *given], text.split(self._slot.text), [*given, None], strict=True)
        (ids,) = self._encoder.ids([self._slot.text.join(self._without_taken(*one) for one in between)])
        markers = iter(given)
        return [next(markers) if token == self._slot.id else token for token in ids]

    def split_markers(self, text: str) -> list[str | int]:
        """Return the parts of a template's own text, in which the text of a marker stands for it."""
        longest_first = sorted(self.markers, key=len, reverse=True)
        pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        pieces = [text] if pattern is None else pattern.split(text)
        return [self.markers.get(piece, piece) for piece in pieces if piece]

    def encode_template(self, text: str) -> list[int]:
        """Encode text that nobody else had a hand in, in which markers count."""
        return self.encode_parts(self.split_markers(text))

    def source_sizes(self, text: str, ids: Sequence[int]) -> NDArray[np.int64]:
        """Return the bytes of ``text`` behind each of its tokens ``ids``; their sum is the bytes of ``text``.

        A blank that the tokenizer puts in front has none, and what a normaliser changed counts as it was.
        """
        if self.decode_bytes(ids) == text.encode():
            return self.sizes_V[np.asarray(ids, dtype=np.int64)]
        return np.array(source_sizes(text, self._encoder.ends(text)), dtype=np.int64)

    @property
    def config(self) -> Mapping[str, Any]:
        """What tokenizer_config.json says, its chat template too."""
        return MappingProxyType(self._config)

    def named(self, key: str, default: object = None) -> int | None:
        """Return the id of what tokenizer_config.json calls ``key``, such as ``pad_token``, or None."""
        token = content_of(self._config.get(key, default))
        return self._ids.get(token) if isinstance(token, str) else None

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, also where prompts are not opened with it."""
        return self.named("bos_token") if self.opening_id is None else self.opening_id

    def special_id(self, token: str) -> int | None:
        """Return the id of a token by its name, such as ``<|im_end|>``, or None."""
        return self._ids.get(token)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes behind ``tokens``; special tokens have none."""
        return b"".join([_bytes_of(self._bytes_V, token) for token in tokens])

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text that ``tokens`` begin and end, with U+FFFD where they do not form UTF-8.

        A blank that the tokenizer puts before a text is none of it. What goes on after other text keeps it:
        see ``stream``.
        """
        return self.decode_bytes(tokens).removeprefix(self._blank).decode("utf-8", errors="replace")

    def stream(self, *, opens: bool = False) -> StreamDecoder:
        """Return a decoder of tokens that go on after other text, or, with ``opens``, that begin one."""
        return StreamDecoder(self._bytes_V, drop=self._blank if opens else b"")

    def _without_taken(self, before: int | None, text: str, after: int | None) -> str:
        """Text between two markers without the blanks that belong to them."""
        text = text.lstrip() if before in self._takes.right else text
        return text.rstrip() if after in self._takes.left else text

    def _find_end(self, where: str) -> int:
        found = self.named("eos_token", END)
        if found is None:
            token = str(content_of(self._config.get("eos_token", END)))[:60]
            raise ConsiliumError(
                f"{where}: its end-of-text token {token!r} is not in the vocabulary; name one as eos_token in"
                f" {CONFIG_FILE}."
            )
        return found

    def _find_opening(self) -> int | None:
        """What the files say of it: a flag, the template of tokenizer.json, or one token for both ends."""
        begin = self.named("bos_token")
        match self._config.get("add_bos_token"):
            case True:
                return begin
            case False:
                return None
            case _:
                return begin if self._before is None and begin == self.eos_id else self._before


def _bytes_of(bytes_V: Sequence[bytes], token: int) -> bytes:
    # A model's vocabulary may be larger than its tokenizer's, and an untrained model does use the difference.
    return bytes_V[token] if token < len(bytes_V) else b""


def _own_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
    }


def _read(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise ConsiliumError(f"cannot read the tokenizer {path}: it is no file; give a folder that has one.")
    if path.exists() and path.stat().st_size > LARGEST_FILE:
        raise ConsiliumError(
            f"{path} has {path.stat().st_size:,} bytes, and no tokenizer needs more than {LARGEST_FILE:,};"
            " copy it again from its source."
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConsiliumError(
            f"cannot read the tokenizer {path}: {error}; give a folder that has one."
        ) from None


def _object(text: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except _MALFORMED as error:
        raise damaged(str(path), error) from None
    if not isinstance(found, dict):
        raise damaged(str(path), TypeError("not a JSON object"))
    return found


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConsiliumError(
            f"the text has half a surrogate pair at character {error.start}, which UTF-8 has not; remove it."
        ) from None
    return text
