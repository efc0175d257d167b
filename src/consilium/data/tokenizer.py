"""Byte-level BPE, trained on the spot or read from a folder, and its streaming decoder.

Legend: V vocabulary.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, final

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from consilium.data.documents import Document, stable_fraction
from consilium.data.gguf import tokenizer_files
from consilium.data.vocabulary import token_bytes
from consilium.errors import ConsiliumError

END = "<|endoftext|>"
SPECIALS = (END, "<|im_start|>", "<|im_end|>")
SMALLEST_VOCABULARY = 256 + len(SPECIALS)
SAMPLE_CHARACTERS = 3_500_000
"""Text that BPE is trained on; more changes little and costs a second a megabyte."""

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"


@final
class StreamDecoder:
    """Decodes token by token. Joined pieces equal the full decode; incomplete characters are held back."""

    def __init__(self, bytes_V: Sequence[bytes]) -> None:
        self._bytes_V = bytes_V
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes, which may be empty."""
        return self._decoder.decode(_bytes_of(self._bytes_V, token))

    def finish(self) -> str:
        """Return what was held back, as U+FFFD where the last character never became whole."""
        return self._decoder.decode(b"", final=True)


@final
class Tokenizer:
    """Text to token ids and back, without loss. Text never encodes to a special token unless asked to.

    ``opening_id`` is the token that opens a prompt, None where a model wants none. ``open_id`` opens a
    document: the same token, else ``eos_id``. In tokenizers trained here both are ``eos_id``, which so also
    closes the document before.
    """

    def __init__(self, description: str, config: Mapping[str, Any], *, where: str = "tokenizer") -> None:
        """``description`` and ``config`` are the contents of tokenizer.json and tokenizer_config.json."""
        self._description = description
        self._config = dict(config)
        self._with_specials = _parse(description, where)
        self._plain = _parse(description, where)
        # Otherwise a file that spells a special token would forge the end of a document.
        self._plain.encode_special_tokens = True
        self._bytes_V = token_bytes(json.loads(description), where=where)
        self.eos_id: int = self._find_end(where)
        self.opening_id: int | None = self._find_opening()

    @classmethod
    def train(cls, documents: Iterable[Document], vocab_size: int) -> Self:
        """Train byte-level BPE (GPT-2's split) on a sample of the documents that are not held out.

        The same documents give the same tokenizer.json. A small text gives fewer tokens than ``vocab_size``.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise ConsiliumError(
                f"tokenizer: a vocabulary of {vocab_size} cannot hold 256 bytes and {len(SPECIALS)} special"
                f" tokens; use vocab_size {SMALLEST_VOCABULARY} or more."
            )
        tokenizer = _untrained()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_sample(documents), trainer)
        return cls(tokenizer.to_str(), _own_config())

    @classmethod
    def of_bytes(cls) -> Self:
        """Return the tokenizer of 256 bytes and the special tokens: BPE without a single merge."""
        return cls.train((), SMALLEST_VOCABULARY)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the two files that ``save`` writes, or the tokenizer of a .gguf file.

        Raises ConsiliumError naming the file that is wrong.
        """
        if folder.suffix == ".gguf":
            return cls(*tokenizer_files(folder), where=str(folder))
        description = _read(folder / TOKENIZER_FILE)
        config = _read(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else "{}"
        try:
            return cls(description, json.loads(config), where=str(folder / TOKENIZER_FILE))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(folder / TOKENIZER_FILE, error) from None

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
        return frozenset(self._with_specials.get_vocab(with_added_tokens=True).values())

    @property
    def sizes_V(self) -> NDArray[np.int64]:
        """Bytes of text behind each token."""
        return np.array([len(data) for data in self._bytes_V], dtype=np.int64)

    def encode(self, text: str) -> list[int]:
        """Encode text in which nothing is special. Raises ConsiliumError for half a surrogate pair."""
        return self._plain.encode(_encodable(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode as ``encode`` does, in parallel."""
        batch = [_encodable(text) for text in texts]
        return [found.ids for found in self._plain.encode_batch_fast(batch, add_special_tokens=False)]

    def encode_template(self, text: str) -> list[int]:
        """Encode text in which special tokens count, such as a filled chat template."""
        return self._with_specials.encode(_encodable(text), add_special_tokens=False).ids

    def named(self, key: str, default: object = None) -> int | None:
        """Return the id of what tokenizer_config.json calls ``key``, such as ``pad_token``, or None."""
        token = _content(self._config.get(key, default))
        return self._with_specials.token_to_id(token) if isinstance(token, str) else None

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, also where prompts are not opened with it."""
        return self.named("bos_token") if self.opening_id is None else self.opening_id

    def special_id(self, token: str) -> int | None:
        """Return the id of a token by its name, such as ``<|im_end|>``, or None."""
        return self._with_specials.token_to_id(token)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes behind ``tokens``; special tokens have none."""
        return b"".join([_bytes_of(self._bytes_V, token) for token in tokens])

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text behind ``tokens``, with U+FFFD where they do not form UTF-8."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        return StreamDecoder(self._bytes_V)

    def _find_end(self, where: str) -> int:
        found = self.named("eos_token", END)
        if found is None:
            token = _content(self._config.get("eos_token", END))
            raise ConsiliumError(
                f"{where}: its end-of-text token {token!r} is not in the vocabulary; name one as eos_token in"
                f" {CONFIG_FILE}."
            )
        return found

    def _find_opening(self) -> int | None:
        """What the files say of it: a flag, the template of tokenizer.json, or one token for both ends."""
        begin = self.named("bos_token", _content(self._config.get("eos_token", END)))
        match self._config.get("add_bos_token"):
            case True:
                return begin
            case False:
                return None
            case _:
                before = self._template_opening()
                return begin if before is None and begin == self.eos_id else before

    def _template_opening(self) -> int | None:
        """The token that tokenizer.json's template puts before a text; it may also put some behind it."""
        plain, filled = (
            self._with_specials.encode("a", add_special_tokens=special).ids for special in (False, True)
        )
        return filled[0] if len(filled) > len(plain) and filled[1 : len(plain) + 1] == plain else None


def _content(token: object) -> object:
    """A special token is named by its text, alone or among its flags."""
    return token["content"] if isinstance(token, dict) else token


def _bytes_of(bytes_V: Sequence[bytes], token: int) -> bytes:
    # A model's vocabulary may be larger than its tokenizer's, and an untrained model does use the difference.
    return bytes_V[token] if token < len(bytes_V) else b""


def _untrained() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _own_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
    }


def _parse(description: str, where: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(description)
    except Exception as error:  # noqa: BLE001 - the library raises no narrower type
        raise _damaged(Path(where), error) from None


def _damaged(path: Path, error: Exception) -> ConsiliumError:
    return ConsiliumError(f"{path} is not a tokenizer ({error}); copy it again from its source.")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConsiliumError(
            f"cannot read the tokenizer {path}: {error}; give a folder that has one."
        ) from None


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConsiliumError(
            f"the text has half a surrogate pair at character {error.start}, which UTF-8 has not; remove it."
        ) from None
    return text


def _sample(documents: Iterable[Document]) -> list[str]:
    """Draw training documents, the same number of characters from each domain as far as it has them.

    A domain that has less leaves its share to the larger ones. Documents are taken in the order of the hash
    of their names, so that the sample does not depend on the order in which they were read.
    """
    by_domain: dict[str, list[Document]] = {}
    for document in documents:
        if not document.held_out:
            by_domain.setdefault(document.domain, []).append(document)
    sizes = {domain: sum(len(document.text) for document in members) for domain, members in by_domain.items()}
    sample: list[str] = []
    left = SAMPLE_CHARACTERS
    for index, domain in enumerate(sorted(by_domain, key=lambda domain: (sizes[domain], domain))):
        chosen = _take(by_domain[domain], left // (len(by_domain) - index))
        left -= sum(map(len, chosen))
        sample.extend(chosen)
    return sample


def _take(documents: Sequence[Document], budget: int) -> list[str]:
    taken: list[str] = []
    for document in sorted(documents, key=lambda document: stable_fraction(document.name, salt="sample")):
        piece = document.text[:budget]
        taken.append(piece)
        budget -= len(piece)
        if budget <= 0:
            break
    return taken
