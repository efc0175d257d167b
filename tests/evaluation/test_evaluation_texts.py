"""Bits per byte by hand, for every kind of tokenizer, and what the public face refuses."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

import consilium as cs
from consilium.data.encoder import source_sizes
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError
from consilium.evaluation.loads import LoadCounter
from consilium.model.decoder import Decoder
from small import KINDS, lively
from tokenizer_kinds import SOURCE, TOKENIZERS

TEXTS = ["yes", " two  words", SOURCE, "<s>cafe\u0301 <|user|>\n\n", "\u1112\u1161\u11ab \ufb01 \U0001f600"]
CONFIG = dataclasses.replace(KINDS["deepseek"], vocab_size=400)
MODEL = lively(CONFIG).eval()


def by_hand(model: Decoder, tokenizer: Tokenizer, texts: list[str], context: int, stride: int) -> float:
    """Every token once, window after window, from logits in float64; bytes are those of the texts."""
    bits = 0.0
    for text in texts:
        ids = [tokenizer.open_id, *tokenizer.encode(text)]
        done, start = 1, 0
        while done < len(ids):
            window = ids[start : start + context + 1]
            logits_SV = model(torch.tensor([window[:-1]])).logits[0].detach().double()
            for place, logprobs_V in enumerate(torch.log_softmax(logits_SV, -1), start=1):
                if start + place >= done:
                    bits -= float(logprobs_V[window[place]]) / math.log(2)
                    done = start + place + 1
            start += stride
    return bits / sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bits_per_byte_divide_by_the_bytes_of_the_source(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    found = cs.evaluate(MODEL, tokenizer, texts=TEXTS, context=16)
    assert found.bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.documents == len(TEXTS)
    assert found.bits_per_byte == pytest.approx(by_hand(MODEL, tokenizer, TEXTS, 16, 16), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 5, 11, 16])
def test_windows_that_overlap_count_every_token_once(stride: int) -> None:
    tokenizer = TOKENIZERS["pieces"]
    found = cs.evaluate(MODEL, tokenizer, texts=TEXTS, context=16, stride=stride)
    assert found.tokens == sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert found.bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.bits_per_byte == pytest.approx(by_hand(MODEL, tokenizer, TEXTS, 16, stride), rel=1e-5)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_sizes_of_tokens_sum_to_the_text(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    sizes = tokenizer.source_sizes(text, ids)
    assert len(sizes) == len(ids)
    assert sizes.sum() == len(text.encode())
    assert (sizes >= 0).all()


def test_ends_in_any_order_give_sizes_that_sum() -> None:
    assert source_sizes("aé你", [2, 1, 99, 0]) == [3, 0, 3, 0]
    assert source_sizes("aé", [1]) == [3]
    assert source_sizes("aé", []) == []


def test_a_path_is_read_as_eval_reads_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SOURCE, encoding="utf-8")
    tokenizer = TOKENIZERS["byte-level"]
    found = cs.evaluate(MODEL, tokenizer, data=tmp_path / "a.txt", context=16)
    assert found.domains == {
        "txt": pytest.approx(cs.evaluate(MODEL, tokenizer, texts=[SOURCE], context=16).bits_per_byte)
    }


def test_loads_are_those_of_every_layer() -> None:
    found = cs.evaluate(MODEL, TOKENIZERS["byte-level"], texts=TEXTS, context=16)
    moe = CONFIG.moe
    assert moe is not None
    assert list(found.loads) == [k for k in CONFIG.moe_layers if k < CONFIG.layers]
    for load in found.loads.values():
        assert sum(load.counts) == int(load.wanted_E.sum()) == found.tokens * moe.router.select.k
        assert load.entropy is not None
        assert 0 < load.entropy <= math.log(moe.experts)
    assert LoadCounter().result() == {}


def test_what_cannot_be_measured_is_one_sentence() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    for keys, message in (
        ({}, "either data, a path, or texts"),
        ({"data": "a", "texts": ["b"]}, "either data, a path, or texts"),
        ({"texts": "a text"}, "give a list of texts"),
        ({"texts": [""]}, "no text to measure"),
        ({"texts": ["a"], "context": CONFIG.max_length + 1}, "beyond the"),
        ({"texts": ["a"], "context": 8, "stride": 9}, "would leave out text"),
        ({"data": "/nowhere/at/all"}, "does not exist"),
    ):
        with pytest.raises(ConsiliumError, match=message):
            cs.evaluate(MODEL, tokenizer, **keys)
    small = lively(dataclasses.replace(CONFIG, vocab_size=259))
    with pytest.raises(ConsiliumError, match="use the tokenizer of this model"):
        cs.evaluate(small, tokenizer, texts=["a"])
