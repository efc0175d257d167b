"""How a tokenizer.json cuts text before its pieces are merged, by the name that llama.cpp has for it."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from consilium.data.vocabulary import BYTE_OF
from consilium.errors import ConsiliumError

Rules = tuple[tuple[str, str], ...]
PIECES: Final = "sentence pieces"
"""SentencePiece's BPE, which cuts nothing: llama.cpp has a tokenizer of its own for it."""
LETTERS: Final = r"\s?[A-Za-zµ"
"""How DeepSeek's class of cased letters begins; it goes on for hundreds of ranges."""

_BYTES, _GPT2, _DIGITS, _SPACES, _OTHER = "bytes", "GPT-2 and bytes", "single digits", "spaces", "unknown"
_QWEN2: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3: Final = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    (
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
)
_DEEPSEEK_LLM: Final = (
    "[\r\n]",
    LETTERS,
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    "\\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    _DIGITS,
)
_COMPOSED: Final = (("NFC", ""),)
_KNOWN: Final[Mapping[tuple[Rules, tuple[str, ...]], str]] = MappingProxyType(
    {
        ((), (_GPT2,)): "gpt-2",
        ((), (_QWEN2, _BYTES)): "qwen2",
        (_COMPOSED, (_QWEN2, _BYTES)): "qwen2",
        ((), (*_DEEPSEEK_V3, _BYTES)): "deepseek-v3",
        ((), (*_DEEPSEEK_LLM, _BYTES)): "deepseek-llm",
    }
)
_PIECES: Final = frozenset(
    {
        ((("prepend", "▁"), (" ", "▁")), ()),
        (((" ", "▁"), (r"\A▁", "▁▁")), (_SPACES,)),
    }
)
"""Rules of text and cut of Llama 2 and Mixtral, as published and as transformers 5 writes them."""


def split_of(description: Mapping[str, Any], where: str) -> str:
    """Return llama.cpp's name of the split, or ``PIECES``.

    Raises ConsiliumError for another one, which llama.cpp would read differently.
    """
    model, cuts = description["model"], _cuts(description.get("pre_tokenizer"))
    rules = _rules(description.get("normalizer"))
    if model["type"] == "BPE":
        if model.get("byte_fallback") and (rules, cuts) in _PIECES:
            return PIECES
        if (rules, cuts) in _KNOWN and not (_DIGITS in cuts and _long_numbers(model["vocab"])):
            return _KNOWN[rules, cuts]
    raise ConsiliumError(
        f"{where} cuts text in a way that is none of {', '.join(sorted({*_KNOWN.values()}))} and {PIECES}, so"
        " llama.cpp would tokenize differently; convert this model with llama.cpp's own script, or without"
        " tokenizer.json."
    )


def composes(description: Mapping[str, Any]) -> bool:
    """Whether the tokenizer composes characters first (NFC), as Qwen2's does; llama.cpp never does."""
    return _rules(description.get("normalizer")) == _COMPOSED


def _cuts(step: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Each cut in short: the pattern of a plain split, or what the step is called here."""
    match step:
        case None:
            return ()
        case {"type": "Sequence", "pretokenizers": steps}:
            return tuple(cut for inner in steps for cut in _cuts(inner))
        case {"type": "Split", "pattern": {"Regex": str() as pattern}, "behavior": "Isolated"} if (
            not step.get("invert")
        ):
            return (LETTERS if pattern.startswith(LETTERS) and pattern.endswith("]+") else pattern,)
        case {"type": "Digits", "individual_digits": True}:
            return (_DIGITS,)
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return (_GPT2 if step.get("use_regex", True) else _BYTES,)
        case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}:
            return (_SPACES,)
        case _:
            return (_OTHER,)


def _rules(step: Mapping[str, Any] | None) -> Rules:
    """Each change of the text in short: what becomes what."""
    match step:
        case None:
            return ()
        case {"type": "Sequence", "normalizers": steps}:
            return tuple(rule for inner in steps for rule in _rules(inner))
        case {"type": "NFC"}:
            return _COMPOSED
        case {"type": "Prepend", "prepend": str() as text}:
            return (("prepend", text),)
        case {
            "type": "Replace",
            "pattern": {"String": str() as old} | {"Regex": str() as old},
            "content": str() as new,
        }:
            return ((old, new),)
        case _:
            return ((_OTHER, str(step)),)


def _long_numbers(vocabulary: Mapping[str, int]) -> bool:
    """Where a token has two digits, llama.cpp would merge what is cut here."""
    return any(_digits(token) > 1 for token in vocabulary)


def _digits(token: str) -> int:
    """Numeric characters of the text behind a byte-level token, in which a letter stands for a byte."""
    text = bytes(BYTE_OF.get(letter, 0) for letter in token).decode(errors="ignore")
    return sum(unicodedata.category(letter).startswith("N") for letter in text)
