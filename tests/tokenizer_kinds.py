"""Tokenizers of every kind that is read, each built here as its family publishes it."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from consilium.data.tokenizer import Tokenizer

BLANK = "▁"
ROLES = ("<|user|>", "<|tool|>", "[INST]", "</s>")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
LETTERS = "abcdefghijklmnopqrstuvwxyz()=:<>|/[]INST"
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
SOURCE = "def add(a):\n    return a + 1\n\nthe quick brown fox <|user|> über alles 你好\n"


def pieces(*, normalizer: Any = None, cut: Any = None, strip: bool = True, fallback: bool = True) -> Library:
    """SentencePiece's BPE as Llama 2 and Mixtral have it; merges can spell every role."""
    vocabulary = {"<unk>": 0, "<s>": 1}
    if fallback:
        vocabulary |= {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    letters = dict.fromkeys(BLANK + LETTERS)
    vocabulary |= {letter: len(vocabulary) + i for i, letter in enumerate(letters)}
    merges = []
    for word in (*ROLES, "return", f"{BLANK}the"):
        for end in range(2, len(word) + 1):
            vocabulary.setdefault(word[:end], len(vocabulary))
            merges.append((word[: end - 1], word[end - 1]))
    library = Library(
        models.BPE(
            vocab=vocabulary,
            merges=list(dict.fromkeys(merges)),
            byte_fallback=fallback,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    if normalizer is not None:
        library.normalizer = normalizer
    if cut is not None:
        library.pre_tokenizer = cut
    steps: list[Any] = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    last = [decoders.Strip(" ", 1, 0)] if strip else []
    library.decoder = decoders.Sequence([*steps, *last]) if fallback else decoders.Metaspace()
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library


def byte_level(*, normalizer: Any = None, prefix: bool = False, ignore_merges: bool = False) -> Library:
    library = Library(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        library.normalizer = normalizer
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([SOURCE] * 3, trainer)
    return library


def made(
    library: Library, *added: tuple[str, bool], config: dict[str, Any] = CONFIG, **keys: Any
) -> Tokenizer:
    """Put ``added`` tokens, each special or not, into the description as a file has them."""
    description = json.loads(library.to_str())
    known = description["model"]["vocab"] | {t["content"]: t["id"] for t in description["added_tokens"]}
    for text, special in added:
        index = known.setdefault(text, max(known.values()) + 1)
        flags = dict.fromkeys(FLAGS, False)
        description["added_tokens"].append({"id": index, "content": text, "special": special, **flags})
    return Tokenizer(json.dumps(description | keys), config)


_OPENED = [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]
_NFC = normalizers.NFC()


def metaspace(scheme: str) -> pre_tokenizers.Metaspace:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)


LIBRARIES = {
    "byte-level": byte_level(),
    "byte-level, blank in front": byte_level(prefix=True),
    "byte-level, composed": byte_level(normalizer=_NFC),
    "byte-level, decomposed": byte_level(normalizer=normalizers.NFD()),
    "byte-level, whole first": byte_level(ignore_merges=True),
    "pieces": pieces(normalizer=normalizers.Sequence(_OPENED)),
    "pieces, no blank": pieces(normalizer=_OPENED[1], strip=False),
    "pieces, composed": pieces(normalizer=normalizers.Sequence([_NFC, *_OPENED])),
    "metaspace, always": pieces(cut=metaspace("always")),
    "metaspace, first": pieces(cut=metaspace("first")),
    "metaspace, never": pieces(cut=metaspace("never"), strip=False),
    "pieces, no fallback": pieces(cut=metaspace("always"), fallback=False),
    "lower case": byte_level(normalizer=normalizers.Lowercase()),
    "blanks stripped": byte_level(normalizer=normalizers.Strip()),
}
"""By kind; the last two lose text."""
ADDED = (("<|user|>", False), ("<|tool|>", True), ("[INST]", False), ("    ", False), ("fox", False))
TOKENIZERS = {kind: made(library, *ADDED) for kind, library in LIBRARIES.items()}
