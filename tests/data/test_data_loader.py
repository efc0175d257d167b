from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from data_corpora import BYTES, corpus_of, documents, lengths
from hypothesis import given
from hypothesis import strategies as st

from consilium.config.data import Data
from consilium.data.batch import Batch
from consilium.data.loader import Loader
from consilium.data.schedule import MOST_DOMAINS, PERIOD, DomainSchedule, Schedule
from consilium.data.shuffle import permutation
from consilium.errors import ConsiliumError

NAMES = ("ids_BS", "targets_BS", "sequence_BS", "position_BS", "valid_BS")
CORPUS = corpus_of([*documents([30, 50, 20], "code"), *documents([9, 8, 7, 6] * 3, "prose")])


def loader(seed: int = 0, batch: int = 6) -> Loader:
    return Loader(CORPUS, Data(sequence_length=8), batch=batch, seed=seed)


def equal(first: Batch, second: Batch) -> bool:
    pairs = [(getattr(first, name), getattr(second, name)) for name in NAMES]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@given(step=st.integers(0, 2000))
def test_a_restart_at_any_step_gives_the_same_batch(step: int) -> None:
    assert equal(loader().batch(step), LONG_RUNNING.batch(step))


LONG_RUNNING = loader()


@given(step=st.integers(0, 50), count=st.sampled_from([1, 2, 3, 6]))
def test_micro_batches_join_to_the_batch(step: int, count: int) -> None:
    parts = [LONG_RUNNING.micro(step, index, count) for index in range(count)]
    whole = LONG_RUNNING.batch(step)
    assert torch.equal(torch.cat([part.ids_BS for part in parts]), whole.ids_BS)
    assert torch.equal(torch.cat([part.targets_BS for part in parts]), whole.targets_BS)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micros", [1, 2])
def test_parts_of_the_ranks_join_to_the_micro_batch_of_one_process(ranks: int, micros: int) -> None:
    found = loader(batch=8)
    for step, index in itertools.product(range(5), range(micros)):
        parts = [found.part(step, (index, micros), (rank, ranks)) for rank in range(ranks)]
        whole = found.micro(step, index, micros)
        joined = Batch(**{name: torch.cat([getattr(part, name) for part in parts]) for name in NAMES})
        assert equal(joined, whole)


@given(step=st.integers(0, 50))
def test_the_batch_size_does_not_change_which_rows_come_next(step: int) -> None:
    small = [loader(batch=3).batch(2 * step + half).ids_BS for half in (0, 1)]
    assert torch.equal(torch.cat(small), LONG_RUNNING.batch(step).ids_BS)


def test_training_rows_have_no_padding_and_a_target_everywhere() -> None:
    batch = LONG_RUNNING.batch(3)
    assert batch.ids_BS.shape == (6, 8)
    assert bool(batch.valid_BS.all())
    assert bool((batch.targets_BS >= 0).all())


def test_seeds_give_different_orders() -> None:
    assert not torch.equal(loader(seed=0).batch(0).ids_BS, loader(seed=1).batch(0).ids_BS)


def test_rows_hold_the_domain_that_they_are_said_to_hold() -> None:
    code = {t for d in documents([1] * 3, "code") for t in BYTES.encode(d.text)} | {BYTES.eos_id}
    counts = Counter[str]()
    for step in range(60):
        rows, batch = LONG_RUNNING.row_domains(step), LONG_RUNNING.batch(step)
        counts.update(rows)
        for domain, ids in zip(rows, batch.ids_BS.tolist(), strict=True):
            assert domain == "prose" or set(ids) <= code
    assert {domain: counts[domain] / 360 for domain in counts} == pytest.approx(loader().shares, abs=0.02)


@given(
    weights=st.lists(st.floats(1e-4, 1), min_size=1, max_size=9),
    start=st.integers(0, 2 * PERIOD),
)
def test_the_closed_form_counts_as_a_loop_would(weights: list[float], start: int) -> None:
    schedule = DomainSchedule(weights)
    seen = dict.fromkeys(range(len(weights)))
    for number in range(start, start + 500):
        domain, rank = schedule.row(number)
        assert seen[domain] in (None, rank - 1)
        seen[domain] = rank


@given(weights=st.lists(st.floats(1e-4, 1), min_size=1, max_size=9))
def test_ranks_of_a_period_hold_every_row_of_a_domain_once(weights: list[float]) -> None:
    schedule = DomainSchedule(weights)
    rows = [schedule.row(number) for number in range(PERIOD)]
    for domain, share in enumerate(schedule.shares):
        assert [rank for of, rank in rows if of == domain] == list(range(round(share * PERIOD)))


@given(weights=st.lists(st.floats(1e-4, 1), min_size=1, max_size=9))
def test_shares_are_those_of_the_weights_to_a_row_or_two(weights: list[float]) -> None:
    for share, weight in zip(DomainSchedule(weights).shares, weights, strict=True):
        assert share == pytest.approx(weight / sum(weights), abs=2 / PERIOD)


def test_domains_are_spread_evenly_over_a_period() -> None:
    schedule = DomainSchedule([3, 1])
    for start in range(0, PERIOD, 16):
        drawn = Counter(schedule.row(start + number)[0] for number in range(16))
        assert abs(drawn[0] - 12) <= 1


@given(
    parts=st.lists(
        st.tuples(st.integers(1, 400), st.lists(st.floats(1e-3, 1), min_size=3, max_size=3)),
        min_size=1,
        max_size=5,
    )
)
def test_a_domain_goes_on_where_it_was_when_shares_change(parts: list[tuple[int, list[float]]]) -> None:
    schedule, row = Schedule([1, 2, 3]), 0
    for rows, weights in parts:
        row += rows
        schedule.change(row, weights)
    seen = [0, 0, 0]
    for number in range(row + 300):
        domain, rank = schedule.row(number)
        assert rank == seen[domain]
        seen[domain] += 1


@given(count=st.integers(0, 300), key=st.integers())
def test_permutations_hold_every_index_once(count: int, key: int) -> None:
    assert sorted(permutation(count, key).tolist()) == list(range(count))


@given(sizes=lengths)
def test_a_domain_shorter_than_a_sequence_is_left_out_with_a_notice(sizes: list[int]) -> None:
    corpus = corpus_of([*documents([500], "long"), *documents(sizes, "short")])
    length = corpus.train["short"].token_count + 1
    found = Loader(corpus, Data(sequence_length=length), batch=2, seed=0)
    assert found.domains == ("long",)
    (notice,) = found.notices
    assert "'short'" in notice
    assert str(length - 1) in notice


def test_text_shorter_than_a_sequence_is_refused_with_both_counts() -> None:
    corpus = corpus_of(documents([20]))
    with pytest.raises(ConsiliumError, match=r"21 tokens.*needs 256; .*--seq"):
        Loader(corpus, Data(sequence_length=256), batch=2, seed=0)


def test_more_domains_than_can_be_mixed_are_refused() -> None:
    found = [document for n in range(MOST_DOMAINS + 1) for document in documents([4], f"domain {n}")]
    with pytest.raises(ConsiliumError, match="1025 domains are more than the 1024"):
        Loader(corpus_of(found), Data(sequence_length=4), batch=2, seed=0)
