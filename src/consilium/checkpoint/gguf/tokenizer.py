"""A tokenizer.json in the keys of GGUF: BPE of bytes, or with byte fallback, that llama.cpp reads alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gguf import TokenType

from consilium.checkpoint.folders import check_vocabulary
from consilium.checkpoint.json_file import read_object
from consilium.data.pieces import scores
from consilium.data.splits import PIECES, composes, split_of
from consilium.data.tokenizer import TOKENIZER_FILE, Tokenizer
from consilium.data.vocabulary import BYTE_TOKEN

_NEVER: Final = "ÿ ÿ"
"""For a tokenizer of bytes: llama.cpp wants at least one merge, and no UTF-8 has two bytes 0xFF."""
_LAST: Final = -1e9
"""The score of what no merge makes: characters, bytes and special tokens."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What llama.cpp needs to tokenize. ``split`` is the name that it gives the first cut of a text.

    It merges by ``merges``, or by ``scores`` where the split is ``PIECES``.
    """

    split: str
    tokens: tuple[str, ...]
    kinds: tuple[TokenType, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    unknown: int | None
    bos: int | None
    eos: int
    pad: int | None
    opens: bool
    composes: bool
    strips: bool
    """Whether an added token takes the blanks beside it."""
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
    check_vocabulary(tokenizer.vocab_size, size, path)
    split, model = split_of(description, str(path)), description["model"]
    merges = tuple(map(_merge, model["merges"]))
    template = tokenizer.config.get("chat_template")
    found = scores(model["vocab"], merges, str(path)) if split == PIECES else {}
    tokens, kinds = _tokens(description, size)
    return Vocabulary(
        split=split,
        tokens=tokens,
        kinds=kinds,
        merges=() if split == PIECES else tuple(map(" ".join, merges)) or (_NEVER,),
        scores=tuple(found.get(token, _LAST) for token in tokens) if split == PIECES else (),
        unknown=tokenizer.special_id(model.get("unk_token") or ""),
        bos=tokenizer.bos_id,
        eos=tokenizer.eos_id,
        pad=tokenizer.named("pad_token"),
        opens=tokenizer.opening_id is not None,
        composes=composes(description),
        strips=any(t.get("lstrip") or t.get("rstrip") for t in description.get("added_tokens") or ()),
        chat_template=template if isinstance(template, str) else None,
    )


def _tokens(description: Mapping[str, Any], size: int) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    model = description["model"]
    fallback = bool(model.get("byte_fallback"))
    found = {i: (token, _kind(token, fallback=fallback)) for token, i in model["vocab"].items()}
    for added in description.get("added_tokens") or ():
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        unknown = added["content"] == model.get("unk_token")
        found[added["id"]] = (added["content"], TokenType.UNKNOWN if unknown else kind)
    rows = [found.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(size)]
    return tuple(token for token, _ in rows), tuple(kind for _, kind in rows)


def _kind(token: str, *, fallback: bool) -> TokenType:
    return TokenType.BYTE if fallback and BYTE_TOKEN.fullmatch(token) else TokenType.NORMAL


def _merge(merge: str | Sequence[str]) -> tuple[str, str]:
    """Two tokens, joined by a space in older files; no token of theirs has one inside."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
