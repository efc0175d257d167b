"""How a tokenizer.json cuts text before its pieces are merged, by llama.cpp's name for it: both ways."""

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
_DIGIT_RUNS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3: Final = rf"{_DIGIT_RUNS}|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
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
_CASED: Final = (
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-"
    "\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-"
    "\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-"
    "\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-"
    "\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4"
    "\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a"
    "-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-"
    "\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-"
    "\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-"
    "\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""Letters of scripts with upper and lower case beside ASCII's, as DeepSeek lists them."""
_DEEPSEEK_LLM: Final = (
    "[\r\n]",
    LETTERS,
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    "\\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    _DIGITS,
)
_DEEPSEEK_CODER: Final = (
    "[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
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
        ((), (*_DEEPSEEK_CODER, _BYTES)): "deepseek-coder",
        ((), (_DIGITS, _GPT2)): "smollm",
        ((), (_LLAMA3, _BYTES)): "llama-bpe",
        ((), (_TEKKEN, _BYTES)): "tekken",
    }
)
_ALIASES: Final[Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("phi-2", "olmo", "jais", "mpt"), "gpt-2"),
        **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), "smollm"),
        **dict.fromkeys(("llama3", "llama-v3", "falcon3"), "llama-bpe"),
        **dict.fromkeys(("deepseek-r1-qwen", "stablelm2"), "qwen2"),
    }
)
"""Other names that llama.cpp has for the same cut."""
_PIECES: Final = frozenset(
    {
        ((("prepend", "▁"), (" ", "▁")), ()),
        (((" ", "▁"), (r"\A▁", "▁▁")), (_SPACES,)),
    }
)
"""Rules of text and cut of Llama 2 and Mixtral, as published and as transformers 5 writes them."""


_FAMILIAR_RULES: Final = frozenset({*_COMPOSED, ("prepend", "▁"), (" ", "▁"), (r"\A▁", "▁▁")})
_FAMILIAR_CUTS: Final = frozenset(
    {cut for _, cuts in _KNOWN for cut in cuts} - {LETTERS} | {f"{LETTERS}{_CASED}]+"}
)
_STEPS: Final = 16
"""Most cuts one after the other that any published tokenizer comes near to."""


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


def steps_of(name: str, where: str) -> dict[str, Any]:
    """Return the pre-tokenizer of tokenizer.json for llama.cpp's name of a split.

    Raises ConsiliumError for a split that is not known: text would be cut differently.
    """
    known = {split: cuts for (rules, cuts), split in _KNOWN.items() if not rules}
    found = _ALIASES.get(name, name)
    if found not in known:
        raise ConsiliumError(
            f"{where}: its text is cut by the rule {name[:40]!r}, which is not read here; use"
            " the tokenizer.json of this model instead."
        )
    steps = [_step(cut) for cut in known[found]]
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def is_familiar(description: Mapping[str, Any]) -> bool:
    """Whether text is changed and cut by rules that are known here, in a time that grows with the text."""
    rules = _rules(description.get("normalizer"))
    return (
        _FAMILIAR_RULES.issuperset(rules)
        and len(rules) == len(set(rules))
        and _is_familiar_cut(description.get("pre_tokenizer"))
    )


def _is_familiar_cut(step: Mapping[str, Any] | None) -> bool:
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            return len(steps) <= _STEPS and all(map(_is_familiar_cut, steps))
        case {"type": "Split", "pattern": {"Regex": pattern}}:
            return pattern in _FAMILIAR_CUTS
        case None | {"type": "ByteLevel" | "Digits" | "Metaspace" | "WhitespaceSplit"}:
            return True
        case _:
            return False


def _step(cut: str) -> dict[str, Any]:
    """``_cuts``, the other way."""
    if cut in {_GPT2, _BYTES}:
        bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        return bytes_of | {"use_regex": cut == _GPT2}
    if cut == _DIGITS:
        return {"type": "Digits", "individual_digits": True}
    pattern = f"{LETTERS}{_CASED}]+" if cut == LETTERS else cut
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


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
