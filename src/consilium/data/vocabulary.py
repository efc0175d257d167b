"""The bytes behind each token of a tokenizer.json, so that decoding and byte counts need no guess.

Legend: V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from consilium.errors import ConsiliumError

LARGEST_VOCABULARY = 2**24
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's stand-in of each byte: itself where printable, else the next letter from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def token_bytes(description: Mapping[str, Any], *, where: str) -> tuple[bytes, ...]:
    """Return the bytes of each token id; special tokens and unused ids have none.

    ``description`` is the content of a tokenizer.json, byte-level (GPT-2, Llama 3, DeepSeek) or with byte
    fallback (Llama 2, Mixtral: a leading space is kept, since a continuation needs it). Raises
    ConsiliumError for others.
    """
    vocabulary: Mapping[str, int] = description["model"]["vocab"]
    kinds = _kinds(description.get("decoder"))
    if "ByteLevel" in kinds:
        found = {index: _byte_level(token) for token, index in vocabulary.items()}
    elif "ByteFallback" in kinds:
        found = {index: _byte_fallback(token) for token, index in vocabulary.items()}
    else:
        raise ConsiliumError(
            f"{where}: its decoder is {'+'.join(sorted(kinds)) or 'missing'}, and only byte-level and"
            " byte-fallback tokenizers are read; convert the tokenizer first."
        )
    for added in description.get("added_tokens", ()):
        found[added["id"]] = b"" if added["special"] else added["content"].encode()
    largest = max(found, default=0)
    if largest >= LARGEST_VOCABULARY:
        raise ConsiliumError(
            f"{where}: token id {largest} is beyond any model's vocabulary; the file is damaged."
        )
    return tuple(found.get(index, b"") for index in range(largest + 1))


def _kinds(decoder: Mapping[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"], *(kind for part in decoder.get("decoders", ()) for kind in _kinds(part))}


def _byte_level(token: str) -> bytes:
    try:
        return bytes(BYTE_OF[letter] for letter in token)
    except KeyError:
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    match = BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode()
