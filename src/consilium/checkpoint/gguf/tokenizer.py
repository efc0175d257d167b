"""A tokenizer.json in the keys of GGUF: byte-level BPE whose split of text llama.cpp knows by a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gguf import TokenType

from consilium.checkpoint.json_file import read_bytes, read_object
from consilium.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer
from consilium.errors import ConsiliumError

_TEMPLATE_FILE: Final = "chat_template.jinja"
_QWEN2: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_NEVER: Final = "ÿ ÿ"
"""For a tokenizer of bytes: llama.cpp wants at least one merge, and no UTF-8 has two bytes 0xFF."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What llama.cpp needs to tokenize. ``split`` is the name that it gives the first cut of a text."""

    split: str
    tokens: tuple[str, ...]
    kinds: tuple[TokenType, ...]
    merges: tuple[str, ...]
    bos: int | None
    eos: int
    pad: int | None
    opens: bool
    chat_template: str | None


def read_vocabulary(folder: Path, size: int) -> Vocabulary | None:
    """Return the tokenizer of ``folder`` for a model of ``size`` tokens, or None where there is none.

    Raises ConsiliumError for a damaged one and for kinds that llama.cpp would read differently.
    """
    path = folder / TOKENIZER_FILE
    if not path.exists():
        return None
    tokenizer = Tokenizer.load(folder)
    description = read_object(path)
    config = read_object(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else {}
    if tokenizer.vocab_size > size:
        raise ConsiliumError(
            f"{path} has {tokenizer.vocab_size} tokens and the model {size}; use the tokenizer of this model."
        )
    tokens, kinds = _tokens(description, size)
    bos = _special(tokenizer, config, "bos_token")
    return Vocabulary(
        split=_split(description, path),
        tokens=tokens,
        kinds=kinds,
        merges=tuple(map(_merge, description["model"]["merges"])) or (_NEVER,),
        bos=bos,
        eos=tokenizer.eos_id,
        pad=_special(tokenizer, config, "pad_token"),
        # A token that ends documents and also begins them opens every prompt here; others say so themselves.
        opens=bool(config.get("add_bos_token", bos == tokenizer.eos_id)),
        chat_template=_chat_template(folder, config),
    )


def _tokens(description: Mapping[str, Any], size: int) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    found = {i: (token, TokenType.NORMAL) for token, i in description["model"]["vocab"].items()}
    for added in description.get("added_tokens") or ():
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        found[added["id"]] = (added["content"], kind)
    rows = [found.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(size)]
    return tuple(token for token, _ in rows), tuple(kind for _, kind in rows)


def _split(description: Mapping[str, Any], path: Path) -> str:
    """The name of this split in llama.cpp, which has its own implementation of each."""
    match description:
        case {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"} as cut} if (
            cut.get("use_regex", True)
            and not cut.get("add_prefix_space", True)
            and description.get("normalizer") is None
        ):
            return "gpt-2"
        case {
            "model": {"type": "BPE"},
            "pre_tokenizer": {
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": str() as pattern}, "behavior": "Isolated"},
                    {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
                ]
            },
        } if pattern == _QWEN2:
            return "qwen2"
        case _:
            raise ConsiliumError(
                f"{path} cuts text in a way that is neither GPT-2's nor Qwen2's, so llama.cpp would tokenize"
                " differently; convert this model with llama.cpp's own script, or without tokenizer.json."
            )


def _merge(merge: str | Sequence[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _special(tokenizer: Tokenizer, config: Mapping[str, Any], key: str) -> int | None:
    named = config.get(key)
    token = named.get("content") if isinstance(named, dict) else named
    return tokenizer.special_id(token) if isinstance(token, str) else None


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / _TEMPLATE_FILE).exists():
        return read_bytes(folder / _TEMPLATE_FILE).decode(errors="replace")
    template = config.get("chat_template")
    return template if isinstance(template, str) else None
