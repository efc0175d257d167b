from __future__ import annotations

from data_corpora import BYTES, CODE, PROSE, corpus_of, documents, lengths
from hypothesis import given
from hypothesis import strategies as st

from consilium.data.documents import Document
from consilium.data.loader import LabelledBatch, held_out_batches
from consilium.data.syntax import CLASSES
from consilium.data.tokenizer import Tokenizer

TEXTS = [
    Document(CODE * 3, "code", "a.py", held_out=True),
    Document(PROSE * 3, "code", "b.md", held_out=True),
    Document(CODE, "code", "c.py docstrings", held_out=True),
]
BPE = Tokenizer.train([CODE + PROSE], 300)


def windows(sizes: list[int], length: int, batch: int, limit: int | None = None) -> list[LabelledBatch]:
    corpus = corpus_of(documents(sizes, held_out=True))
    return list(held_out_batches(corpus, "prose", length, batch, limit_tokens=limit))


shapes = {"length": st.integers(1, 50), "batch": st.integers(1, 5)}


@given(sizes=lengths, **shapes)
def test_every_held_out_token_is_predicted_once_in_order(sizes: list[int], length: int, batch: int) -> None:
    targets = [
        token
        for labelled in windows(sizes, length, batch)
        for row in labelled.batch.targets_BS.tolist()
        for token in row
        if token >= 0
    ]
    assert targets == [token for document in documents(sizes) for token in BYTES.encode(document.text)]


@given(sizes=lengths, **shapes)
def test_a_document_is_predicted_from_its_opening_token_on(sizes: list[int], length: int, batch: int) -> None:
    before = None
    for labelled in windows(sizes, length, batch):
        rows = zip(
            labelled.batch.ids_BS.tolist(),
            labelled.batch.targets_BS.tolist(),
            labelled.batch.valid_BS.tolist(),
            strict=True,
        )
        for ids, targets, valid in rows:
            count = sum(valid)
            assert valid == [True] * count + [False] * (len(valid) - count)
            assert ids[0] in {BYTES.eos_id, before}
            assert ids[1:count] == targets[: count - 1]
            assert targets[count:] == [-1] * (len(targets) - count)
            before = targets[count - 1]


@given(length=st.integers(1, 50), batch=st.integers(1, 5))
def test_bytes_of_the_targets_are_the_bytes_of_the_text(length: int, batch: int) -> None:
    for tokenizer in (BYTES, BPE):
        found = held_out_batches(corpus_of(TEXTS, tokenizer), "code", length, batch)
        total = sum(int(labelled.bytes_BS.sum()) for labelled in found)
        assert total == sum(len(document.text.encode()) for document in TEXTS)
        assert corpus_of(TEXTS, tokenizer).held_out["code"].byte_count == total


@given(sizes=lengths, limit=st.integers(1, 200), **shapes)
def test_a_limit_is_kept_by_whole_windows(sizes: list[int], limit: int, length: int, batch: int) -> None:
    found = windows(sizes, length, batch, limit)
    taken = sum(int((labelled.batch.targets_BS >= 0).sum()) for labelled in found)
    rows = sum(len(labelled.batch.ids_BS) for labelled in found)
    assert taken <= max(limit, length)
    assert rows == 1 or taken <= limit
    assert rows >= 1
    assert limit < sum(sizes) or taken == sum(sizes)


def test_a_limit_takes_windows_from_all_over_the_text() -> None:
    found = windows([40] * 10, 20, 4, limit=100)
    letters = {int(row[1]) for labelled in found for row in labelled.batch.ids_BS}
    assert len(letters) == 5


def test_syntax_labels_stand_on_the_input_tokens_of_python_files_alone() -> None:
    corpus = corpus_of(TEXTS)
    labels = [
        label
        for labelled in held_out_batches(corpus, "code", 7, 2)
        for row, valid in zip(labelled.syntax_BS.tolist(), labelled.batch.valid_BS.tolist(), strict=True)
        for label, there in zip(row, valid, strict=True)
        if there
    ]
    first = len((CODE * 3).encode())
    assert [CLASSES[label] for label in labels[1:6]] == ["keyword"] * 3 + ["space", "name"]
    assert labels[0] == -1
    assert -1 not in labels[1:first]
    assert set(labels[first:]) == {-1}


def test_padding_has_no_bytes_and_no_label() -> None:
    (labelled,) = held_out_batches(
        corpus_of([TEXTS[0], *documents([3], "code", held_out=True)]), "code", 999, 9
    )
    padding = ~labelled.batch.valid_BS
    assert bool(padding.any())
    assert int(labelled.bytes_BS[padding].sum()) == 0
    assert set(labelled.syntax_BS[padding].tolist()) == {-1}
