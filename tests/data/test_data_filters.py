"""Filters: what they drop of examples that training never saw, and that every dropped text is on record."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.cli.main import main
from consilium.config.data import Advertisement, Data, Fluency, TextPath
from consilium.config.training import Bytes, Training
from consilium.data import filters as module
from consilium.data import library
from consilium.data.corpus import build_corpus
from consilium.data.examples import ADVERTISEMENTS, INFORMATION, PLACES, THINGS, examples, passages
from consilium.data.filters import Classifier, classifier
from consilium.data.library import Library
from consilium.errors import ConsiliumError
from consilium.records.dropped import DROPPED_FILE, read_dropped
from consilium.training.loop import train
from small import DEEPSEEK

KINDS = ("advertisement", "fluency")
every = pytest.mark.parametrize("kind", KINDS)
PROSE = (
    "The council of the town decided in March to repair the old bridge over the river, and it took a year."
)
ADVERT = "Buy our new kettle now and save 40% on your order! Call today, free shipping for every customer!"
NOISE = "river | kettle | March | council | bridge | town | repair | order | customer | shipping | bridge"


@every
def test_unseen_templates_are_told_apart(kind: str) -> None:
    of = classifier(kind)
    found = [(of.score(text) < 0.5, good) for text, good in examples(kind, 600, seen=False, seed=7)]
    dropped = [good for drop, good in found if drop]
    assert dropped.count(False) / len(dropped) > 0.9
    assert dropped.count(False) / 300 > 0.85


def test_training_sees_nothing_of_what_is_measured() -> None:
    for seen, unseen in (ADVERTISEMENTS, INFORMATION, THINGS, PLACES):
        assert not set(seen) & set(unseen)
    assert not set(passages(0)) & set(passages(1))
    assert passages(0)
    for kind in KINDS:
        texts = [{text for text, _ in examples(kind, 200, seen=seen)} for seen in (True, False)]
        assert not texts[0] & texts[1]


@every
def test_a_classifier_comes_out_the_same(kind: str) -> None:
    again = Classifier.train(examples(kind, 60, seen=True), pieces=kind == "advertisement")
    first = Classifier.train(examples(kind, 60, seen=True), pieces=kind == "advertisement")
    np.testing.assert_array_equal(again._weights_X, first._weights_X)
    good = [first.score(text) for text, is_good in examples(kind, 60, seen=True) if is_good]
    bad = [first.score(text) for text, is_good in examples(kind, 60, seen=True) if not is_good]
    assert sum(good) / len(good) > sum(bad) / len(bad) + 0.2


@given(text=st.text(max_size=60))
def test_any_text_has_a_score(text: str) -> None:
    for kind in KINDS:
        assert 0 < classifier(kind).score(text) < 1


@given(text=st.text(st.sampled_from("abcäö 你"), max_size=40))
def test_pieces_are_hashed_as_a_loop_would(text: str) -> None:
    data = text.lower().encode()
    expected = set()
    for size in (3, 4):
        for start in range(len(data) - size + 1):
            value = 2166136261
            for byte in data[start : start + size]:
                value = (value ^ byte) * 16777619 % 2**32
            expected.add((value >> 11) % module._BUCKETS)
    assert module._pieces(text).tolist() == sorted(expected)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [{"text": f"{PROSE} {i}"} for i in range(30)]
    lines[7:7], lines[20:20] = [{"text": ADVERT * 3}], [{"text": NOISE * 3}]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Data(sources=(TextPath(path=str(folder)),), sequence_length=24, held_out=0.3)


def filtered(data: Data, *filters: Advertisement | Fluency) -> Data:
    return Data(
        sources=data.sources, sequence_length=data.sequence_length, held_out=data.held_out, filters=filters
    )


def test_what_is_dropped_is_in_no_token_and_everything_else_is(data: Data) -> None:
    found = Library.open(filtered(data, Advertisement(), Fluency()))
    assert [(one.name, one.filter) for one in found.dropped] == [
        ("a.jsonl:8", "advertisement"),
        ("a.jsonl:21", "fluency"),
    ]
    kept = {document.text for document in found.all_documents()}
    everything = {document.text for document in Library.open(data).all_documents()}
    assert everything - kept == {ADVERT * 3, NOISE * 3}
    assert found.sha256 != Library.open(data).sha256
    notices: list[str] = []
    corpus = build_corpus(filtered(data, Advertisement()), 300, start=Bytes(), progress=notices.append)
    assert any("1 texts are dropped by the advertisement filter" in notice for notice in notices)
    assert [one.name for one in corpus.dropped] == ["a.jsonl:8"]


def test_a_hit_neither_reads_nor_scores(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = data.sources
    assert isinstance(source, TextPath)
    for path in Path(source.path).iterdir():
        os.utime(path, (1e9, 1e9))
    chosen = filtered(data, Advertisement(), Fluency())
    first = Library.open(chosen)

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(library, "read_texts", never)
    monkeypatch.setattr("consilium.data.filters.classifier", never)
    again = Library.open(chosen)
    assert again.dropped == first.dropped
    assert again.sha256 == first.sha256


def test_filters_that_drop_everything_are_refused(data: Data) -> None:
    with pytest.raises(ConsiliumError, match="the filters drop every text"):
        Library.open(filtered(data, Fluency(least=0.9999999)))


def test_a_run_lists_what_was_dropped(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Training(
        model=DEEPSEEK, tokenizer=Bytes(), data=filtered(data, Advertisement(), Fluency()), steps=1, batch=2
    )
    train(config, tmp_path / "run")
    listed = read_dropped(tmp_path / "run")
    assert [(one.filter, one.name) for one in listed] == [
        ("advertisement", "a.jsonl:8"),
        ("fluency", "a.jsonl:21"),
    ]
    assert main(["runs", str(tmp_path / "run"), "--dropped"]) == 0
    assert "a.jsonl:21" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "run"), "--dropped", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["dropped"]) == 2
    (tmp_path / "run" / DROPPED_FILE).write_text("{}\n")
    with pytest.raises(ConsiliumError, match="line 1"):
        read_dropped(tmp_path / "run")
    assert read_dropped(tmp_path) == []
