"""The tokenizer in a GGUF file as the contents of tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gguf import TokenType

from consilium.data.pieces import merges
from consilium.data.splits import steps_of
from consilium.errors import ConsiliumError
from consilium.ops.gguf import damaged, read_header

Keys = Mapping[str, Any]
_OWN: Final = "tokenizer.ggml."
_MARKS: Final = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SENTENCE_PIECE: Final = {"bos": 1, "eos": 2, "unknown": 0}
"""What llama.cpp takes where a file with SentencePiece's tokens names none."""
_WHOLE_FIRST: Final = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})
"""Splits whose pieces are tokens where they can be, whatever the merges say; texts open with a token."""
_NONE: Final = (None, "no_vocab", "none")
_ENDS: Final = frozenset(
    {
        *("<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|endoftext|>"),
        *(
            "<|end_of_text|>",
            "<|eot_id|>",
            "<|eom_id|>",
            "<EOT>",
            "_<EOT>",
            "[EOT]",
            "[EOS]",
            "<eos>",
            "</s>",
        ),
        *("<end_of_turn>", "<turn|>", "<end_of_utterance>", "<|tool_response>"),
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)
"""Texts of tokens that llama.cpp takes for special ones, after which it ends an answer, whatever ids and
kinds a file names."""
_END_IDS: Final = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_SPACE: Final = "▁"


def tokenizer_files(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the content of tokenizer.json and, parsed, of tokenizer_config.json, template included.

    Raises ConsiliumError where the file has no tokenizer, a damaged one or one of a kind that is not read.
    """
    header = read_header(path)
    keys = {k.removeprefix(_OWN): v for k, v in header.keys.items() if k.startswith(_OWN)}
    template = header.keys.get("tokenizer.chat_template")
    tokens, kinds = _vocabulary(path, keys)
    match keys.get("model"):
        case "gpt2":
            description = _byte_level(path, keys, tokens, kinds)
        case "llama":
            description = _sentence_piece(path, keys, tokens, kinds)
        case kind if kind in _NONE:
            raise ConsiliumError(f"{path} holds no tokenizer; give a folder with tokenizer.json.")
        case other:
            raise ConsiliumError(
                f"{path}: its tokenizer is of the kind {str(other)[:40]!r}, and byte-level BPE (gpt2) and"
                " SentencePiece's (llama) are read; use the Hugging Face folder of this model."
            )
    config = _config(path, keys, tokens) | ({} if template is None else {"chat_template": str(template)})
    return json.dumps(description, ensure_ascii=False), config


def has_tokenizer(path: Path) -> bool:
    return read_header(path).keys.get(f"{_OWN}model") not in _NONE


def stop_ids(path: Path) -> tuple[int, ...]:
    """Return the tokens that end an answer: those that the file names, and those known by their text.

    Those that fill or part the text of a file in the middle of code count, as in llama.cpp.
    """
    keys = read_header(path).keys
    named = [keys.get(f"{_OWN}{name}_token_id") for name in _END_IDS]
    tokens = keys.get(f"{_OWN}tokens", [])
    known = [i for i, token in enumerate(tokens) if token in _ENDS] if _texts(tokens) else []
    return tuple(dict.fromkeys(token for token in (*named, *known) if isinstance(token, int)))


def mark_ids(path: Path) -> tuple[int | None, int | None]:
    """Return the tokens that begin and pad a text, None where the file names none."""
    keys = read_header(path).keys
    begin, padding = (keys.get(f"{_OWN}{name}_token_id") for name in ("bos", "padding"))
    return begin, padding


def _vocabulary(path: Path, keys: Keys) -> tuple[Sequence[str], Sequence[int]]:
    tokens = keys.get("tokens")
    if tokens is None:
        return [], []
    kinds = keys.get("token_type", [TokenType.NORMAL] * len(tokens) if isinstance(tokens, list) else None)
    if not _texts(tokens) or not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise damaged(path, "has a list of tokens that does not fit the list of their kinds")
    pairs = zip(tokens, kinds, strict=True)
    return tokens, [TokenType.CONTROL if token in _ENDS else kind for token, kind in pairs]


def _byte_level(path: Path, keys: Keys, tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    split = str(keys.get("pre", "default"))
    pairs = keys.get("merges")
    if pairs is None or not _texts(pairs) or any(len(pair.split(" ")) != 2 for pair in pairs):
        raise damaged(path, "has no list of merges, or one that is not of pairs")
    ordinary = _ordinary(tokens, kinds)
    made = [pair for pair in (pair.split(" ") for pair in pairs) if "".join(pair) in ordinary]
    model = _bpe(ordinary, made) | {"ignore_merges": split in _WHOLE_FIRST}
    return _described(model, tokens, kinds) | {
        "pre_tokenizer": steps_of(split, str(path)),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }


def _sentence_piece(path: Path, keys: Keys, tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    scores = keys.get("scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise damaged(path, "has a list of tokens that does not fit the list of their scores")
    vocabulary = {token: i for i, token in enumerate(tokens) if kinds[i] != TokenType.UNUSED}
    normal = {t: float(scores[i]) for t, i in vocabulary.items() if kinds[i] == TokenType.NORMAL}
    unknown = _token(path, keys, tokens, "unknown")
    model = _bpe(vocabulary, merges(normal)) | {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    prefix = bool(keys.get("add_space_prefix", True))
    opened = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    spaced = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    back = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}]
    stripped = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoders = [*back, {"type": "ByteFallback"}, {"type": "Fuse"}, *stripped]
    return _described(model, tokens, kinds) | {
        "normalizer": {"type": "Sequence", "normalizers": [*opened, *spaced]},
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _ordinary(tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, int]:
    return {t: i for i, (t, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == TokenType.NORMAL}


def _bpe(vocabulary: Mapping[str, int], made: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(vocabulary),
        "merges": [list(pair) for pair in made],
    }


def _described(model: dict[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    marks = {TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, "special": kind != TokenType.USER_DEFINED, **flags}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in marks
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model,
    }


def _config(path: Path, keys: Keys, tokens: Sequence[str]) -> dict[str, Any]:
    marks = {f"{ours}_token": _token(path, keys, tokens, theirs) for ours, theirs in _MARKS.items()}
    opens = keys.get("model") == "llama" or keys.get("pre") in _WHOLE_FIRST
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, token in marks.items() if token is not None},
        "add_bos_token": bool(keys.get("add_bos_token", opens)) and marks["bos_token"] is not None,
        "clean_up_tokenization_spaces": False,
    }


def _token(path: Path, keys: Keys, tokens: Sequence[str], name: str) -> str | None:
    default = _SENTENCE_PIECE.get(name) if keys.get("model") == "llama" else None
    found = keys.get(f"{name}_token_id", default)
    if found is None:
        return None
    if type(found) is not int or not 0 <= found < len(tokens):
        raise damaged(path, f"names token {found!r} as {name}, and has {len(tokens):,} tokens")
    return tokens[found]


def _texts(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(text, str) for text in found)
