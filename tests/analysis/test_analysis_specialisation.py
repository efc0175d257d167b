from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.analysis.specialisation import (
    UNLABELLED,
    Choices,
    Labels,
    SpecialisationCounter,
    associate,
    count,
    mutual_information,
    specialise,
)
from consilium.moe.types import Routing, Tokens

TABLES = st.integers(1, 6).flatmap(
    lambda labels: st.lists(
        st.lists(st.integers(0, 50), min_size=labels, max_size=labels), min_size=1, max_size=6
    )
)


def choices(seed: int, *, tokens: int, experts: int, k: int) -> Choices:
    generator = torch.Generator().manual_seed(seed)
    experts_NK = torch.rand(tokens, experts, generator=generator).topk(k).indices
    return Choices(experts_NK, torch.rand(tokens, k, generator=generator) < 0.8, experts)


def labels(seed: int, *, tokens: int, number: int) -> Labels:
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.randint(UNLABELLED, number, (tokens,), generator=generator)
    return Labels(tuple(f"label {i}" for i in range(number)), label_N)


def routing(chosen: Choices) -> Routing:
    tokens = chosen.experts_NK.shape[0]
    zeros_TE = torch.zeros(tokens, chosen.experts)
    weights_TK = torch.ones(chosen.experts_NK.shape)
    keep_TK = chosen.keep_NK
    return Routing(
        logits_TE=zeros_TE,
        scores_TE=zeros_TE,
        experts_TK=chosen.experts_NK,
        weights_TK=weights_TK,
        considered_TK=keep_TK,
        wanted_TK=keep_TK,
        keep_TK=keep_TK,
        clean_TE=zeros_TE,
    )


def flat(tokens: int) -> Tokens:
    zeros_T = torch.zeros(tokens, dtype=torch.int64)
    return Tokens(zeros_T, zeros_T, zeros_T, zeros_T == 0)


def slow_information(counts: list[list[int]]) -> float:
    total = sum(map(sum, counts))
    columns = [sum(column) for column in zip(*counts, strict=True)]
    return sum(
        n / total * math.log2(n * total / (sum(row) * column))
        for row in counts
        for n, column in zip(row, columns, strict=True)
        if n
    )


@given(TABLES)
def test_mutual_information_agrees_with_its_definition(table: list[list[int]]) -> None:
    assert mutual_information(torch.tensor(table)) == pytest.approx(slow_information(table), abs=1e-9)


@given(TABLES)
def test_mutual_information_is_symmetric_and_at_most_the_smaller_entropy(table: list[list[int]]) -> None:
    bits = mutual_information(torch.tensor(table))
    assert bits == pytest.approx(mutual_information(torch.tensor(table).T), abs=1e-9)
    assert 0 <= bits <= math.log2(min(len(table), len(table[0]))) + 1e-9


@given(st.integers(0, 1000), st.sampled_from([1, 2, 7, 63]), st.integers(1, 5), st.integers(1, 4))
def test_counting_agrees_with_a_loop(seed: int, tokens: int, experts: int, number: int) -> None:
    chosen = choices(seed, tokens=tokens, experts=experts, k=min(2, experts))
    named = labels(seed + 1, tokens=tokens, number=number)
    slow = [[0] * number for _ in range(experts)]
    for token in range(tokens):
        for place in range(chosen.experts_NK.shape[1]):
            label = int(named.label_N[token])
            if chosen.keep_NK[token, place] and label != UNLABELLED:
                slow[int(chosen.experts_NK[token, place])][label] += 1
    assert count(chosen, named.label_N, number).tolist() == slow


def test_a_small_sample_of_chance_shows_information_but_none_above_chance() -> None:
    results = [
        associate(
            choices(seed, tokens=400, experts=16, k=4),
            labels(seed + 100, tokens=400, number=5),
            torch.Generator().manual_seed(seed),
        )
        for seed in range(10)
    ]
    # The plug-in estimate of independent variables is about (E - 1)(L - 1) / (2 N ln 2) bits, not zero.
    assert min(result.bits for result in results) > 0.01
    assert abs(sum(result.corrected_bits for result in results) / 10) < 0.002


def test_an_expert_per_label_explains_the_whole_choice() -> None:
    label_N = torch.arange(400) % 4
    chosen = Choices(label_N[:, None], torch.ones(400, 1, dtype=torch.bool), 4)
    result = associate(chosen, Labels(tuple("abcd"), label_N), torch.Generator().manual_seed(0))
    assert result.bits == pytest.approx(2.0, abs=1e-9)
    assert 0.97 < result.normalised <= 1.0
    assert result.counts_EL == tuple(tuple(100 if e == label else 0 for label in range(4)) for e in range(4))


@pytest.mark.parametrize("tokens", [0, 1])
def test_too_little_text_says_nothing(tokens: int) -> None:
    chosen = Choices(torch.zeros(tokens, 2, dtype=torch.int64), torch.ones(tokens, 2, dtype=torch.bool), 3)
    named = Labels(("a", "b"), torch.zeros(tokens, dtype=torch.int64))
    result = associate(chosen, named, torch.Generator().manual_seed(0))
    assert (result.bits, result.shuffled_bits, result.normalised) == (0.0, 0.0, 0.0)


def test_tokens_without_label_or_kept_choice_take_no_part() -> None:
    label_N = torch.tensor([0, 1, UNLABELLED, 0])
    keep_NK = torch.tensor([[True], [True], [True], [False]])
    chosen = Choices(torch.tensor([[0], [1], [2], [2]]), keep_NK, 3)
    result = associate(chosen, Labels(("a", "b"), label_N), torch.Generator().manual_seed(0))
    assert result.counts_EL == ((1, 0), (0, 1), (0, 0))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 100))
def test_many_passes_equal_one(sizes: list[int], seed: int) -> None:
    total = sum(sizes)
    layers = {layer: choices(seed + layer, tokens=total, experts=5, k=2) for layer in (1, 3)}
    domain = labels(seed + 10, tokens=total, number=3)
    syntax = labels(seed + 11, tokens=total, number=4)
    counter = SpecialisationCounter()
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        counter.label(domain.label_N[part], syntax.label_N[part])
        for layer, chosen in layers.items():
            cut = Choices(chosen.experts_NK[part], chosen.keep_NK[part], chosen.experts)
            counter.routing(layer, routing(cut), flat(size))
        start += size
    assert counter.result(domain.names, syntax.names) == specialise(layers, domain, syntax)


@pytest.mark.parametrize("experts", [2**15, 2**15 + 1, 131_072])
def test_the_last_of_many_experts_is_counted_as_itself(experts: int) -> None:
    counter = SpecialisationCounter()
    label_T = torch.zeros(1, dtype=torch.int64)
    counter.label(label_T, label_T)
    chosen = Choices(torch.tensor([[experts - 1]]), torch.ones(1, 1, dtype=torch.bool), experts)
    counter.routing(0, routing(chosen), flat(1))
    (layer,) = counter.result(("a",), ("x",)).layers
    assert layer.domain.counts_EL[-1] == (1,)


def test_the_result_counts_tokens_with_a_domain() -> None:
    domain = Labels(("a",), torch.tensor([0, UNLABELLED, 0]))
    assert specialise({}, domain, domain).tokens == 2


def test_a_counter_that_saw_nothing_has_an_empty_result() -> None:
    record = SpecialisationCounter().result(("a",), ("x",))
    assert (record.tokens, record.layers) == (0, ())


def seen(labelled: Tensor, routed: int) -> None:
    counter = SpecialisationCounter()
    if labelled.numel():
        counter.label(labelled, labelled)
    counter.routing(0, routing(choices(0, tokens=routed, experts=2, k=1)), flat(routed))


def test_a_pass_must_be_labelled_token_by_token() -> None:
    with pytest.raises(AssertionError, match="before each pass"):
        seen(torch.zeros(0, dtype=torch.int64), 3)
    with pytest.raises(AssertionError, match="3 tokens routed, 2 labelled"):
        seen(torch.zeros(2, dtype=torch.int64), 3)
