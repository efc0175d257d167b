from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from consilium.config.data import Data, TextPath
from consilium.config.model import Model
from consilium.config.training import Bytes
from consilium.data.corpus import Corpus, build_corpus
from consilium.data.documents import Document
from consilium.data.forms import Completion
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError
from consilium.evaluation.bits import Reading, measure
from consilium.model.decoder import Decoder
from data.data_corpora import corpus_of
from small import KINDS, lively

TEXTS = {"plain": ["one two three", "four"], "other": ["äöü 你好 and more", "x" * 40]}


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    for domain, texts in TEXTS.items():
        (tmp_path / domain).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / domain / f"{i}.txt").write_text(text, encoding="utf-8")
    return build_corpus(Data(sources=(TextPath(path=str(tmp_path)),)), 300, start=Bytes())


def spelled_out(model: Decoder, corpus: Corpus, domain: str) -> float:
    """Bits per byte of the held-out documents, one token after another, each document after an end token."""
    text = corpus.held_out[domain]
    bits, size = 0.0, 0
    for start, end in zip(text.starts_N, text.ends_N, strict=True):
        ids = [int(token) for token in text.ids_T[start:end]]
        logprobs_SV = torch.log_softmax(model(torch.tensor([ids])).logits[0].detach().double(), -1)
        bits -= sum(float(logprobs_SV[i, ids[i + 1]]) for i in range(len(ids) - 1)) / math.log(2)
        size += len(corpus.tokenizer.decode_bytes(ids))
    return bits / size


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_bits_per_byte_are_those_of_each_document_alone(config: Model, corpus: Corpus) -> None:
    model = lively(config).eval()
    found = measure(model, corpus, Reading(64, batch=3))
    assert found.domains.keys() == TEXTS.keys()
    for domain, value in found.domains.items():
        assert value == pytest.approx(spelled_out(model, corpus, domain), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(sum(found.domains.values()) / 2)


def test_a_uniform_model_needs_log2_of_the_vocabulary_a_byte(corpus: Corpus) -> None:
    model = lively(KINDS["dense"]).eval()
    with torch.no_grad():
        model.norm.weight.zero_()
    found = measure(model, corpus, Reading(16))
    assert found.bits_per_byte == pytest.approx(math.log2(300), rel=1e-5)


def test_evaluation_changes_no_state(corpus: Corpus) -> None:
    model = lively(KINDS["deepseek"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure(model, corpus, Reading(16, limit_tokens=20))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_tokenizer_of_the_corpus_is_that_of_bytes(corpus: Corpus) -> None:
    assert corpus.tokenizer.files() == Tokenizer.of_bytes().files()


def test_held_out_text_of_which_nothing_is_learned_has_no_figure() -> None:
    """The plain mean over no domain would be 0: a perfect model."""
    asked = [Document(Completion("why", ""), "d", "0", held_out=True)]
    with pytest.raises(ConsiliumError, match="nothing of the held-out text is learned"):
        measure(lively(KINDS["dense"]), corpus_of(asked), Reading(8))
