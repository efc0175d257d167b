"""What the tokens of a tokenizer.json stand for: the bytes behind each, and which of them are markers.

Legend: V vocabulary.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from consilium.errors import ConsiliumError

LARGEST_VOCABULARY = 2**21
_BLANK = "▁"
"""A space in the pieces of SentencePiece."""
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

    ``description`` is the content of a tokenizer.json, BPE that is byte-level (GPT-2, Llama 3, DeepSeek) or
    of SentencePiece's kind (Llama 2, Mixtral: a leading space is kept, since a continuation needs it). Raises
    ConsiliumError for others.
    """
    model, kinds = description["model"], _kinds(description.get("decoder"))
    if model.get("type", "BPE") != "BPE":
        raise ConsiliumError(
            f"{where}: its model is {str(model['type'])[:40]}, and BPE is read; convert the tokenizer first."
        )
    vocabulary: Mapping[str, int] = model["vocab"]
    if "ByteLevel" in kinds:
        found = {index: _byte_level(token) for token, index in vocabulary.items()}
    elif kinds & {"ByteFallback", "Metaspace"}:
        fallback = "ByteFallback" in kinds
        found = {index: _piece(token, fallback=fallback) for token, index in vocabulary.items()}
    else:
        raise ConsiliumError(
            f"{where}: its decoder is {'+'.join(sorted(kinds)) or 'missing'}, and only byte-level and"
            " SentencePiece-like tokenizers are read; convert the tokenizer first."
        )
    if unknown := model.get("unk_token"):
        found[vocabulary[unknown]] = b""
    for added in description.get("added_tokens") or ():
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


def _piece(token: str, *, fallback: bool) -> bytes:
    match = BYTE_TOKEN.fullmatch(token) if fallback else None
    return bytes([int(match[1], 16)]) if match else token.replace(_BLANK, " ").encode()


def marker_ids(description: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens that say something about a text and are none of it, by their own text.

    Files do not agree on what ``special`` means: DeepSeek's marks its roles and tools ``special: false``. So
    every added token is a marker but blanks and plain words, which some tokenizers add to their vocabulary
    that way (GPT-NeoX: runs of spaces); and these too where they are special or the configuration gives them
    a role.
    """
    ids: Mapping[str, int] = description["model"]["vocab"]
    added = list(description.get("added_tokens") or ())
    known = {**ids, **{token["content"]: token["id"] for token in added}}
    marks = {token["content"] for token in added if token["special"] or not _is_plain(token["content"])}
    return {text: known[text] for text in sorted(marks | _roles(config)) if text in known}


@dataclass(frozen=True, slots=True)
class Blanks:
    """Added tokens that take the blanks on their left or right along, as Phi-3's roles do the line's end."""

    left: frozenset[int]
    right: frozenset[int]


def taken_blanks(description: Mapping[str, Any]) -> Blanks:
    """Return which tokens a file says ``lstrip`` and ``rstrip`` of."""
    added = list(description.get("added_tokens") or ())
    left, right = (frozenset(t["id"] for t in added if t.get(key)) for key in ("lstrip", "rstrip"))
    return Blanks(left, right)


def _is_plain(text: str) -> bool:
    return all(letter.isalnum() or letter.isspace() or letter == _BLANK for letter in text)


def _roles(config: Mapping[str, Any]) -> set[str]:
    """The tokens that tokenizer_config.json names for a role, alone or in a list."""
    found: list[object] = []
    for key, value in config.items():
        if key.endswith("_token") or key in ("additional_special_tokens", "extra_special_tokens"):
            found += value if isinstance(value, list) else [value]
    for token in (config.get("added_tokens_decoder") or {}).values():
        found += [token] if token.get("special") else []
    texts = map(content_of, found)
    return {text for text in texts if isinstance(text, str) and text}


def content_of(token: object) -> object:
    """A special token is named by its text, alone or among its flags."""
    return token.get("content") if isinstance(token, dict) else token


def template_opening(description: Mapping[str, Any]) -> int | None:
    """Return the one token that the post-processor puts before a text; it may also put some behind it."""
    found: list[int] = []
    for step in _steps(description.get("post_processor")):
        match step:
            case {"type": "TemplateProcessing", "single": pieces, "special_tokens": tokens}:
                names = [p["SpecialToken"]["id"] for p in itertools.takewhile(_is_special, pieces)]
                found = [i for name in names for i in tokens[name]["ids"]] + found
            case {"type": "BertProcessing" | "RobertaProcessing", "cls": [_, int() as first]}:
                found = [first, *found]
            case _:
                pass
    return found[0] if len(found) == 1 else None


def _steps(processor: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    match processor:
        case None:
            return []
        case {"type": "Sequence", "processors": steps}:
            return [inner for step in steps for inner in _steps(step)]
        case _:
            return [processor]


def _is_special(piece: Mapping[str, Any]) -> bool:
    return "SpecialToken" in piece
