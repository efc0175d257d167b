from __future__ import annotations

import itertools
import json
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import transformers
from data_corpora import CODE, PROSE, documents
from hypothesis import given
from hypothesis import strategies as st

from consilium.data import bpe as module
from consilium.data.documents import stable_fraction
from consilium.data.template import find_template
from consilium.data.tokenizer import END, SMALLEST_VOCABULARY, SPECIALS, Tokenizer
from consilium.errors import ConsiliumError

TEXTS = [(CODE + PROSE) * 20]
BPE = Tokenizer.train(TEXTS, 400)
BYTES = Tokenizer.of_bytes()

both = pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@both
@given(text=unicode)
def test_any_unicode_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@both
@given(text=unicode)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.sizes_V[ids].sum() == len(text.encode())


@both
@given(ids=st.lists(st.integers(0, SMALLEST_VOCABULARY + 20), max_size=40))
def test_streamed_pieces_join_to_the_full_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


@given(text=unicode)
def test_a_stream_cut_anywhere_has_shown_whole_characters_only(text: str) -> None:
    stream = BYTES.stream()
    shown = ""
    for token in BYTES.encode(text):
        shown += stream.push(token)
        assert text.startswith(shown)
    assert shown == text
    assert stream.finish() == ""


def test_every_byte_and_every_two_bytes_stream_as_they_decode() -> None:
    """Characters cut in the middle, bytes that begin none, and surrogates: each is a sign, and no error."""
    token_of = {BYTES.decode_bytes([token]): token for token in range(SMALLEST_VOCABULARY)}
    singles = [token_of[bytes([byte])] for byte in range(256)]
    for ids in ([], *((first,) for first in singles), *itertools.product(singles, repeat=2)):
        stream = BYTES.stream()
        streamed = "".join(map(stream.push, ids)) + stream.finish()
        assert streamed == BYTES.decode_bytes(ids).decode(errors="replace") == BYTES.decode(ids)


@given(text=unicode)
def test_a_batch_encodes_as_one_by_one(text: str) -> None:
    assert BPE.encode_batch([text, PROSE]) == [BPE.encode(text), BPE.encode(PROSE)]


@both
def test_text_cannot_forge_special_tokens_but_a_template_can(tokenizer: Tokenizer) -> None:
    text = "".join(SPECIALS)
    specials = [tokenizer.special_id(token) for token in SPECIALS]
    assert not set(tokenizer.encode(text)) & set(specials)
    assert not set(tokenizer.encode_batch([text])[0]) & set(specials)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_template(text) == specials
    assert tokenizer.decode(tokenizer.encode_template(text)) == ""


def test_training_twice_gives_the_same_files() -> None:
    assert Tokenizer.train(TEXTS, 400).files() == BPE.files()


def test_bpe_learns_and_bytes_do_not() -> None:
    assert len(BPE.encode(CODE)) < 0.6 * len(CODE.encode())
    assert len(BYTES.encode(CODE)) == len(CODE.encode())
    assert BYTES.vocab_size == SMALLEST_VOCABULARY
    assert SMALLEST_VOCABULARY < BPE.vocab_size <= 400


def test_the_order_of_reading_does_not_matter() -> None:
    found = [document.text for document in documents([50, 60, 70, 80])]
    assert Tokenizer.train(found, 300).files() == Tokenizer.train(found[::-1], 300).files()


sizes = st.dictionaries(
    st.sampled_from("abcd"), st.lists(st.integers(0, 900), min_size=1, max_size=20), min_size=1
)


@given(sizes=sizes, budget=st.integers(0, 5000))
def test_the_sample_is_balanced_and_bounded(sizes: dict[str, list[int]], budget: int) -> None:
    """As many characters from each domain as far as it has them, whole texts but the last."""
    counts = {name: np.array(of, dtype=np.int64) for name, of in sizes.items()}
    order = {
        name: np.array([stable_fraction(f"{name} {i}", salt="") for i in range(len(of))])
        for name, of in sizes.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SAMPLE_CHARACTERS", budget)
        drawn = module.sample(counts, order)
    totals = {name: int(drawn[name].sum()) for name in sizes}
    whole = {name: int(counts[name].sum()) for name in sizes}
    assert sum(totals.values()) == min(budget, sum(whole.values()))
    least = min(totals.values())
    assert all(
        totals[name] == whole[name] or totals[name] + len(sizes) > max(totals.values()) for name in sizes
    )
    assert all(totals[name] >= min(least, whole[name]) for name in sizes)
    for name, of in sizes.items():
        partly = [i for i, count in enumerate(of) if 0 < drawn[name][i] < count]
        assert len(partly) <= 1


@both
def test_a_saved_tokenizer_is_the_same_when_loaded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.files() == tokenizer.files()
    assert loaded.eos_id == tokenizer.eos_id
    assert loaded.encode(CODE + PROSE) == tokenizer.encode(CODE + PROSE)


def test_transformers_reads_the_saved_tokenizer(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(CODE + PROSE, add_special_tokens=False) == BPE.encode(CODE + PROSE)
    assert theirs.decode(BPE.encode(CODE + PROSE)) == CODE + PROSE
    assert theirs.eos_token_id == BPE.eos_id


def test_ids_beyond_the_vocabulary_have_no_text() -> None:
    assert BPE.decode([5, 100_000]) == BPE.decode([5])


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConsiliumError, match=f"vocab_size {SMALLEST_VOCABULARY} or more"):
        Tokenizer.train(TEXTS, SMALLEST_VOCABULARY - 1)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": 3}', "\ufffe"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConsiliumError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_an_unknown_end_token_is_refused(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    with pytest.raises(ConsiliumError, match=r"'</s>' is not in the vocabulary"):
        Tokenizer.load(tmp_path)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ConsiliumError, match="surrogate pair at character 1"):
        BPE.encode("a\ud800")


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
}


APPENDS = TEMPLATE | {
    "single": [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
    ]
}


@pytest.mark.parametrize(
    ("config", "template", "opening"),
    [
        ({}, None, None),
        ({"bos_token": None}, APPENDS, None),
        ({"bos_token": END}, None, 0),
        ({"bos_token": None}, None, None),
        ({"bos_token": "<|im_start|>"}, None, None),
        ({"bos_token": "<|im_start|>", "add_bos_token": True}, None, 1),
        ({"bos_token": {"content": "<|im_start|>"}, "add_bos_token": True}, None, 1),
        ({"bos_token": "<|im_start|>", "add_bos_token": False}, TEMPLATE, None),
        ({"bos_token": "<|im_start|>"}, TEMPLATE, 1),
        ({"bos_token": None}, TEMPLATE, 1),
    ],
    ids=str,
)
def test_a_prompt_opens_as_the_files_say(
    config: dict[str, object], template: dict[str, object] | None, opening: int | None
) -> None:
    description = json.loads(BPE.files()["tokenizer.json"]) | {"post_processor": template}
    found = Tokenizer(json.dumps(description), {"eos_token": END, **config})
    assert found.opening_id == opening
    assert found.open_id == (found.eos_id if opening is None else opening)


def test_a_byte_fallback_tokenizer_decodes_by_bytes() -> None:
    vocabulary = {END: 0, "<0xE4>": 1, "<0xBD>": 2, "<0xA0>": 3, "▁a": 4, "b": 5}
    description = {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": END, "special": True} | dict.fromkeys(FLAGS, False)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": True},
    }
    found = Tokenizer(json.dumps(description), {"eos_token": END})
    assert found.decode([4, 5, 1, 2, 3]) == " ab你"
    assert found.decode([1, 2]) == "\ufffd"


FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@given(text=st.text("ab \n", max_size=500))
def test_pieces_to_train_on_are_bounded_and_join_to_the_text(text: str) -> None:
    pieces = list(module.bounded(text * 3))
    assert "".join(pieces) == text * 3
    assert all(len(run) <= 64 for piece in pieces for run in re.findall(r"\S+|\s+", piece))


def test_text_without_a_blank_trains_in_a_time_that_grows_with_it() -> None:
    letters = "".join(random.Random(0).choices("ACGT", k=60_000))
    begun = time.process_time()
    found = Tokenizer.train([letters], 600)
    assert time.process_time() - begun < 5
    assert found.vocab_size == 600


def test_a_chat_template_beside_the_tokenizer_goes_where_the_tokenizer_goes(tmp_path: Path) -> None:
    """A model that is trained on keeps its way of speaking; the file wins over the key."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    config = dict(BPE.config) | {"chat_template": "{{ 'of the key' }}"}
    Tokenizer(BPE.files()["tokenizer.json"].decode(), config).save(first)
    (first / "chat_template.jinja").write_text("{{ 'of the file' }}", encoding="utf-8")
    Tokenizer.load(first).save(second)
    template = find_template(second, Tokenizer.load(second))
    assert template is not None
    assert template.source == "{{ 'of the file' }}"


def test_a_folder_may_be_given_as_a_str(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    assert Tokenizer.load(str(tmp_path)).files() == BPE.files()
