"""The tokenizer in a GGUF file is that of the folder, or is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import transformers
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from checkpoint.gguf_models import DEEPSEEK_LLM, llama
from checkpoint.models import trained
from consilium.checkpoint import store
from consilium.checkpoint.gguf.export import export
from consilium.data.gguf import stop_ids, tokenizer_files
from consilium.data.pieces import scores
from consilium.data.splits import split_of
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError


def tokenizer_keys(folder: Path, tokenizer: Tokenizer, **config: object) -> dict[str, Any]:
    size = tokenizer.vocab_size + 5
    store.save(trained(dataclasses.replace(llama(), vocab_size=size)), folder / "model", tokenizer=tokenizer)
    path = folder / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    (folder / "model" / "manifest.json").unlink()
    export(folder / "model", folder / "model.gguf")
    return {name: field.contents() for name, field in GGUFReader(folder / "model.gguf").fields.items()}


@pytest.fixture(scope="module")
def learned() -> Tokenizer:
    text = "the cat sat on the mat and the dog sat on the log; " * 20
    return Tokenizer.train([text], 300)


def test_the_tokenizer_is_that_of_the_folder(learned: Tokenizer, tmp_path: Path) -> None:
    found = tokenizer_keys(tmp_path, learned, chat_template="{{ messages }}")
    described = json.loads(learned.files()["tokenizer.json"])
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert {token: tokens.index(token) for token in described["model"]["vocab"]} == described["model"][
        "vocab"
    ]
    assert tokens[-5:] == [f"[PAD{learned.vocab_size + i}]" for i in range(5)]
    assert (kinds[:4], kinds[-6:]) == ([3, 3, 3, 1], [1, 5, 5, 5, 5, 5])
    assert [merge.split(" ") for merge in found["tokenizer.ggml.merges"]] == described["model"]["merges"]
    ends = {name: found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")}
    assert ends == {"bos": 0, "eos": 0, "padding": 0}
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.chat_template"] == "{{ messages }}"


def test_a_tokenizer_says_itself_whether_prompts_are_opened(learned: Tokenizer, tmp_path: Path) -> None:
    found = tokenizer_keys(tmp_path, learned, add_bos_token=False, bos_token=None)
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.ggml.bos_token_id" not in found


@pytest.mark.parametrize("kind", [gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED])
def test_texts_at_which_llama_cpp_ends_are_special_tokens_whatever_their_kind(
    kind: gguf.TokenType, tmp_path: Path
) -> None:
    """Each was drawn once in llama.cpp, the first line ended its answer there and the second did not."""
    ends = (
        "<|im_end|> [EOT] _<EOT> <EOT> [EOS] <eos> <|flush|> <|calls|> <turn|> <end_of_turn> </s> <|fim_pad|>"
    )
    others = "<_EOT> <|eot|> <|end_of_turn|> <|message_sep|> <|mark|> <|fim_sep|> <file_sep>"
    tokens = ["a", "b", *ends.split(), *others.split()]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1, 1, *[int(kind)] * (len(tokens) - 2)])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_eos_token_id(1)
    writer.add_key_value("tokenizer.ggml.fim_rep_token_id", 0, gguf.GGUFValueType.UINT32)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    assert stop_ids(tmp_path / "t.gguf") == (1, 0, *range(2, 2 + len(ends.split())))
    described = json.loads(tokenizer_files(tmp_path / "t.gguf")[0])
    special = {token["content"] for token in described["added_tokens"] if token["special"]}
    assert special == {*ends.split(), *(others.split() if kind == gguf.TokenType.CONTROL else ())}


def test_a_tokenizer_of_bytes_has_a_merge_that_no_text_needs(tmp_path: Path) -> None:
    (merge,) = tokenizer_keys(tmp_path, Tokenizer.of_bytes())["tokenizer.ggml.merges"]
    assert merge.encode("latin-1") == b"\xff \xff"


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": {"type": "NFC"}},
    ],
)
def test_a_tokenizer_that_would_be_read_differently_is_refused(
    change: dict[str, object], learned: Tokenizer, tmp_path: Path
) -> None:
    size = learned.vocab_size
    config = dataclasses.replace(llama(), vocab_size=size)
    store.save(trained(config), tmp_path / "model", tokenizer=learned)
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(
        ConsiliumError, match=r"tokenizer\.json cuts text in a way that is none of deepseek-coder"
    ):
        export(tmp_path / "model", tmp_path / "model.gguf")


def test_a_tokenizer_larger_than_the_model_is_refused(learned: Tokenizer, tmp_path: Path) -> None:
    store.save(trained(llama()), tmp_path / "model", tokenizer=learned)
    with pytest.raises(ConsiliumError, match=r"has \d+ tokens and the model 259"):
        export(tmp_path / "model", tmp_path / "model.gguf")


PIECES_TEXT = (
    "the cat he met sat; she says that the other thing, at the gate, heats the teeth of the hat. " * 9
)
UNKNOWN, BEGIN, END_OF_TEXT = "<unk>", "<s>", "</s>"


def complete(description: dict[str, Any]) -> dict[str, Any]:
    """All ways to make each token, as SentencePiece's models have them once they are lists of merges."""
    model = description["model"]
    order = list(dict.fromkeys("".join(merge) for merge in model["merges"]))
    ways = [(token[:i], token[i:]) for token in order for i in range(1, len(token))]
    model["merges"] = [[a, b] for a, b in ways if a in model["vocab"] and b in model["vocab"]]
    return description


@pytest.fixture(scope="module")
def pieces() -> dict[str, Any]:
    """A tokenizer.json like Mixtral's: no cut, spaces as a letter, bytes for what it does not know."""
    trained = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token=UNKNOWN))
    trained.pre_tokenizer = (
        pre_tokenizers.Metaspace()
    )  # words, as SentencePiece learns from, and then whole texts
    trained.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = [UNKNOWN, BEGIN, END_OF_TEXT]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    trained.train_from_iterator(PIECES_TEXT.split(". "), trainer)
    trained.pre_tokenizer = None
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    description = json.loads(trained.to_str())
    vocabulary = description["model"]["vocab"]
    vocabulary |= {f"<0x{i:02X}>": len(vocabulary) + i for i in range(256)}
    return complete(description)


def loaded(description: dict[str, Any]) -> Tokenizer:
    config = {"bos_token": BEGIN, "eos_token": END_OF_TEXT, "unk_token": UNKNOWN, "add_bos_token": True}
    return Tokenizer(json.dumps(description), config)


def merged_by_score(text: str, score: dict[str, float]) -> list[str]:
    """llama.cpp's way: join the neighbours of the highest score, the first of equals, again and again."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        places = [(-score[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in score]
        if not places:
            return parts
        _, i = min(places)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_pieces_are_written_with_scores_and_bytes(pieces: dict[str, Any], tmp_path: Path) -> None:
    found = tokenizer_keys(tmp_path, loaded(pieces))
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    kind = dict(zip(tokens, kinds, strict=True))
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("llama", "default")
    assert [kind[name] for name in (UNKNOWN, BEGIN, END_OF_TEXT, "<0x0A>", "▁the")] == [2, 3, 3, 6, 1]
    assert "tokenizer.ggml.merges" not in found
    ends = {name: found[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos")}
    assert ends == {"unknown": 0, "bos": 1, "eos": 2}
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_space_prefix"] is True
    score = dict(zip(tokens, found["tokenizer.ggml.scores"], strict=True))
    assert max(score.values()) == 0.0
    assert score["▁the"] > score["▁cat"] > score["<0x0A>"]


@given(st.text(alphabet="thecaslogu ;", max_size=40))
def test_scores_merge_as_the_merges_do(pieces: dict[str, Any], text: str) -> None:
    merges = [(left, right) for left, right in pieces["model"]["merges"]]
    score = scores(pieces["model"]["vocab"], merges, "here")
    vocabulary = pieces["model"]["vocab"]
    found: list[int] = []
    for part in merged_by_score(text, score) if text else []:
        bytes_ = [f"<0x{byte:02X}>" for byte in part.encode()]
        found += [vocabulary[name] for name in ([part] if part in vocabulary else bytes_)]
    assert found == loaded(pieces).encode(text)


def test_merges_that_no_score_can_say_are_refused(pieces: dict[str, Any]) -> None:
    vocabulary = pieces["model"]["vocab"]
    merges = [(left, right) for left, right in pieces["model"]["merges"]]
    several = next(token for token in map("".join, merges) if list(map("".join, merges)).count(token) > 1)
    gone = next(pair for pair in merges if "".join(pair) == several)
    with pytest.raises(ConsiliumError, match=re.escape(f"lack {gone[0]!r} + {gone[1]!r}")):
        scores(vocabulary, [pair for pair in merges if pair != gone], "here")
    with pytest.raises(ConsiliumError, match="out of order"):
        scores(vocabulary, [*(pair for pair in merges if pair != gone), gone], "here")


def test_the_splits_of_deepseek_are_known_by_name(learned: Tokenizer) -> None:
    """DeepSeek-V3's real file is read in test_checkpoint_llama_cpp; here is its older sister's."""
    described = json.loads(learned.files()["tokenizer.json"]) | {"pre_tokenizer": DEEPSEEK_LLM}
    described["normalizer"] = {"type": "Sequence", "normalizers": []}
    # The bytes of this sign are written with raised digits, and it is no number.
    described["model"]["vocab"] |= {"æ²³": 998, "½": 997}
    assert split_of(described, "here") == "deepseek-llm"
    described["model"]["vocab"]["12"] = 999
    with pytest.raises(ConsiliumError, match="here cuts text in a way"):
        split_of(described, "here")


@pytest.mark.parametrize("scheme", ["first", "never"])
def test_pieces_with_another_rule_for_the_first_space_are_refused(
    pieces: dict[str, Any], scheme: str
) -> None:
    cut = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    with pytest.raises(ConsiliumError, match="cuts text in a way"):
        split_of(pieces | {"normalizer": None, "pre_tokenizer": cut}, "here")


def test_a_token_that_no_merge_makes_and_two_others_spell_is_refused() -> None:
    with pytest.raises(ConsiliumError, match="lack 'a' \\+ 'b'"):
        scores({"a": 0, "b": 1, "ab": 2, "c": 3, "bc": 4}, [("b", "c")], "here")


def test_the_tokenizer_of_qwen2_is_written_and_what_differs_is_said(tmp_path: Path) -> None:
    """As transformers builds it: NFC first, which llama.cpp leaves out."""
    letters = json.loads(Tokenizer.of_bytes().files()["tokenizer.json"])["model"]["vocab"]
    theirs = transformers.Qwen2Tokenizer(vocab=letters, merges=[])
    theirs.save_pretrained(tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    assert tokenizer.opening_id is None
    config = dataclasses.replace(llama(), vocab_size=tokenizer.vocab_size)
    store.save(trained(config), tmp_path / "model", tokenizer=tokenizer)
    done = export(tmp_path / "model", tmp_path / "model.gguf")
    assert [text for text in done.notices if "NFC" in text]
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "qwen2"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
