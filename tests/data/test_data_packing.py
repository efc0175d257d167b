from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from data_corpora import BYTES, corpus_of, documents, lengths
from hypothesis import given
from hypothesis import strategies as st

from consilium.data.encoding import TokenizedText
from consilium.data.packing import PackedDomain, Row

END = BYTES.eos_id

seeds = st.integers(0, 5)


def packed(sizes: list[int], rows: int, seed: int) -> tuple[PackedDomain, TokenizedText, int]:
    """Pack documents of ``sizes`` bytes in rows of which an epoch holds ``rows`` and perhaps a part."""
    text = corpus_of(documents(sizes)).train["prose"]
    length = max(1, text.token_count // rows)
    return PackedDomain(text, length, seed, "prose"), text, length


def naive_stream(text: TokenizedText, row_count: int, domain: PackedDomain) -> list[int]:
    """The stream laid out token by token."""
    stream: list[int] = []
    epoch = 0
    while len(stream) <= row_count:
        for document in domain._epoch(epoch).order_N.tolist():
            stream += text.ids_T[text.starts_N[document] : text.ends_N[document]].tolist()
        epoch += 1
    return stream


@given(sizes=lengths, rows=st.integers(1, 9), seed=seeds)
def test_rows_are_the_stream_of_shuffled_documents_and_nothing_else(
    sizes: list[int], rows: int, seed: int
) -> None:
    domain, text, length = packed(sizes, rows, seed)
    count = 3 * domain.rows_per_epoch
    found = Counter(tuple(domain.row(number).ids_S.tolist()) for number in range(count))
    stream = naive_stream(text, count * length, domain)
    assert found == Counter(tuple(stream[r * length : (r + 1) * length]) for r in range(count))


@given(sizes=lengths, seed=seeds)
def test_every_token_appears_exactly_once_an_epoch(sizes: list[int], seed: int) -> None:
    domain, text, _ = packed(sizes, sum(sizes) + len(sizes), seed)
    for epoch in range(3):
        numbers = range(epoch * domain.rows_per_epoch, (epoch + 1) * domain.rows_per_epoch)
        seen = np.concatenate([domain.row(number).ids_S for number in numbers])
        assert sorted(seen.tolist()) == sorted(text.ids_T.tolist())


@given(sizes=lengths, rows=st.integers(1, 9), seed=seeds)
def test_a_target_is_the_next_token_of_the_same_document_or_its_end(
    sizes: list[int], rows: int, seed: int
) -> None:
    domain, _, _ = packed(sizes, rows, seed)
    for number in range(2 * domain.rows_per_epoch):
        row = domain.row(number)
        for place in range(len(row.ids_S) - 1):
            if row.sequence_S[place + 1] == row.sequence_S[place]:
                assert row.targets_S[place] == row.ids_S[place + 1] != END
            else:
                assert row.targets_S[place] == END
        # A document repeats one letter, so a target from another would show.
        letters = {int(token) for token in row.ids_S} - {END}
        for token, target in zip(row.ids_S.tolist(), row.targets_S.tolist(), strict=True):
            assert token == END or target in {token, END}
            assert token != END or target != END
        assert len(letters) <= int(row.sequence_S[-1]) + 1


def naive_labels(row: Row) -> tuple[list[int], list[int]]:
    sequence, position = [0], [0]
    for token in row.ids_S.tolist()[1:]:
        sequence.append(sequence[-1] + (token == END))
        position.append(0 if token == END else position[-1] + 1)
    return sequence, position


@given(sizes=lengths, rows=st.integers(1, 9), seed=seeds)
def test_documents_and_positions_start_anew_at_every_document_and_row(
    sizes: list[int], rows: int, seed: int
) -> None:
    domain, _, _ = packed(sizes, rows, seed)
    for number in range(2 * domain.rows_per_epoch):
        row = domain.row(number)
        assert (row.sequence_S.tolist(), row.position_S.tolist()) == naive_labels(row)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    domain, _, _ = packed([5] * 30, 10, seed=0)
    other, _, _ = packed([5] * 30, 10, seed=1)
    orders = [tuple(d._epoch(epoch).order_N.tolist()) for d in (domain, other) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(30)) for order in orders)


def test_neighbours_come_from_different_places_of_a_long_document() -> None:
    domain, _, _ = packed([20, 4000, 20], 400, seed=0)
    drawn = domain._block(0)
    assert sorted(drawn.tolist()) == list(range(domain.rows_per_epoch))
    assert np.mean(np.abs(np.diff(drawn)) == 1) < 0.05


def test_another_process_draws_the_same_rows() -> None:
    script = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r};"
        "from test_data_packing import packed; print(packed([5] * 30, 10, seed=3)[0].row(77).ids_S.tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONHASHSEED": "11"},
        capture_output=True,
        check=True,
        text=True,
    )
    assert run.stdout.strip() == str(packed([5] * 30, 10, seed=3)[0].row(77).ids_S.tolist())
