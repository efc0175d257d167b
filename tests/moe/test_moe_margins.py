"""Quantile balancing: margins of tokens, their quantiles exact and by histogram, and what these balance."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.config.balance import Balance as BalanceConfig
from consilium.config.balance import QuantileBias
from consilium.config.router import Router, Score, Sigmoid, Softmax, TopK
from consilium.moe.margins import PER_OCTAVE, Exact, Histogram, margins
from consilium.moe.types import LayerMode, Taken, alone
from moe.cases import EXPERTS, layer, moe, tokens, vectors
from moe.ranks import together

TRAINING = LayerMode(training=True)
STATISTICS = ("exact", "histogram")


def numbers(count: int, experts: int, seed: int, scale: float = 1.0, *, ties: bool = False) -> Tensor:
    values = torch.randn(count, experts, generator=torch.Generator().manual_seed(seed)) * scale
    return (values * 3).round() / 3 if ties else values


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 60),
    scale=st.sampled_from([1e-30, 1e-4, 1.0, 1e30]),
    ties=st.booleans(),
    data=st.data(),
)
def test_the_exact_statistic_is_the_sorted_one_bit_for_bit(
    seed: int, count: int, scale: float, *, ties: bool, data: st.DataObject
) -> None:
    values_TE = numbers(count, 5, seed, scale, ties=ties)
    values_TE[0, :3] = torch.tensor([-torch.inf, torch.inf, 0.0])
    rank, cut = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, count))
    expected = values_TE.sort(dim=0, descending=True).values[rank]
    assert torch.equal(Exact((values_TE,)).beyond(rank, alone), expected)
    halves = [Exact((values_TE[:cut],)), Exact((values_TE[cut:],))]
    assert torch.equal((halves[0] + halves[1]).beyond(rank, alone), expected)
    apart = together([functools.partial(half.beyond, rank) for half in halves])
    assert all(torch.equal(found, expected) for found in apart)


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 60),
    scale=st.sampled_from([1e-4, 1e-2, 1.0, 10.0]),
    data=st.data(),
)
def test_the_histogram_is_right_to_a_bin_and_the_same_in_parts_and_on_ranks(
    seed: int, count: int, scale: float, data: st.DataObject
) -> None:
    values_TE, valid_T = numbers(count, 4, seed, scale), torch.ones(count, dtype=torch.bool)
    rank, cut = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, count))
    whole = Histogram.of(values_TE, valid_T)
    found_E = whole.beyond(rank, alone)
    expected_E = values_TE.sort(dim=0, descending=True).values[rank]
    assert ((found_E - expected_E).abs() <= expected_E.abs() / PER_OCTAVE + 2.0**-20).all()
    halves = [Histogram.of(values_TE[part], valid_T[part]) for part in (slice(cut), slice(cut, None))]
    assert torch.equal((halves[0] + halves[1]).counts_EB, whole.counts_EB)
    apart = together([functools.partial(half.beyond, rank) for half in halves])
    assert all(torch.equal(found, found_E) for found in apart)


def test_margins_beyond_the_octaves_are_in_the_outermost_bins() -> None:
    values_TE = torch.tensor([[-torch.inf], [-1e9], [-1e-9], [0.0], [1e-9], [1e9], [torch.inf], [5.0]])
    counts_EB = Histogram.of(values_TE, torch.ones(8, dtype=torch.bool)).counts_EB
    assert counts_EB.sum() == 8
    assert (counts_EB[0, 0], counts_EB[0, -1]) == (2, 2)
    assert counts_EB[0, counts_EB.shape[1] // 2 - 1 : counts_EB.shape[1] // 2 + 1].tolist() == [1, 2]


def test_padding_is_in_no_statistic() -> None:
    values_TE, valid_T = numbers(20, 6, seed=0), torch.arange(20) < 13
    found_TE = margins(values_TE, valid_T, 2)
    alone_TE = margins(values_TE[:13], valid_T[:13], 2)
    assert torch.equal(found_TE[:13], alone_TE)
    for rank in range(13):
        assert torch.equal(Exact((found_TE,)).beyond(rank, alone), Exact((alone_TE,)).beyond(rank, alone))
    padded, plain = Histogram.of(found_TE, valid_T), Histogram.of(alone_TE, valid_T[:13])
    assert torch.equal(padded.counts_EB, plain.counts_EB)


@given(seed=st.integers(0, 10**6), k=st.integers(1, 5))
def test_a_token_chooses_where_its_margin_is_above_zero(seed: int, k: int) -> None:
    values_TE = numbers(25, 6, seed)
    chosen_TE = torch.zeros(25, 6, dtype=torch.bool).scatter(1, values_TE.topk(k, dim=1).indices, value=True)
    found_TE = margins(values_TE, torch.ones(25, dtype=torch.bool), k)
    assert torch.equal(found_TE > 0, chosen_TE)
    by_hand = [[v - sorted(row, reverse=True)[k] for v in row] for row in values_TE.tolist()]
    assert torch.allclose(found_TE, torch.tensor(by_hand), atol=1e-6)


@given(seed=st.integers(0, 10**6), k=st.integers(1, 3), count=st.sampled_from([8, 24, 37]))
def test_one_step_leaves_each_expert_its_share_above_the_tokens_limits(seed: int, k: int, count: int) -> None:
    """With scores and limits held, up to the tokens that have another expert of the same margin."""
    found_TE = margins(numbers(count, 4, seed), torch.ones(count, dtype=torch.bool), k)
    share = count * k // 4
    moved_TE = found_TE - Exact((found_TE,)).beyond(share, alone)
    assert ((moved_TE > 0).sum(dim=0) <= share).all()
    assert ((moved_TE >= 0).sum(dim=0) > share).all()


def routed(score: Score, rule: QuantileBias, *, offset: str = "scores") -> list[float]:
    """max/mean - 1 of a layer whose scores favour one expert by far, while only the bias moves."""
    router = Router(score=score, offset=offset, select=TopK(k=2))
    built = layer(moe(router, balance=BalanceConfig(bias=rule)))
    built.balance.bias_E.zero_()
    x_TD = vectors(512) + 2 * built.router.projection.weight[0].detach()
    found = []
    for _ in range(12):
        report = built(x_TD, tokens(512), TRAINING).report
        assert report.margins is not None
        built.balance.step(Taken(report.wanted_E, margins=report.margins))
        found.append(float(report.load_E.max() / report.load_E.float().mean()) - 1)
    return found


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("offset", ["scores", "logits"])
@pytest.mark.parametrize("score", [Sigmoid(), Softmax()], ids=lambda score: score.kind)
def test_a_collapsed_router_is_balanced_within_a_few_steps(
    score: Score, offset: str, statistics: str
) -> None:
    """Where rules with a rate need hundreds, on softmax scores too (the reason to have it)."""
    violation = routed(score, QuantileBias(statistics=statistics), offset=offset)
    assert violation[0] > 1.5
    assert max(violation[5:]) < 0.35
    assert violation[-1] < 0.2


@pytest.mark.parametrize("statistics", STATISTICS)
def test_momentum_goes_a_part_of_the_way(statistics: str) -> None:
    router = Router(score=Sigmoid(), offset="scores", select=TopK(k=2))
    moved = []
    for momentum in (0.0, 0.75):
        rule = QuantileBias(statistics=statistics, momentum=momentum)
        built = layer(moe(router, balance=BalanceConfig(bias=rule)))
        before = built.balance.bias_E.clone()
        report = built(vectors(64), tokens(64), TRAINING).report
        built.balance.step(Taken(report.wanted_E, margins=report.margins))
        moved.append(built.balance.bias_E - before)
    assert torch.allclose(0.25 * moved[0], moved[1], atol=1e-6)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_micro_batches_and_ranks_move_the_bias_as_one_batch(statistics: str) -> None:
    router = Router(score=Sigmoid(), offset="scores", select=TopK(k=2))
    config = moe(router, balance=BalanceConfig(bias=QuantileBias(statistics=statistics)))
    x_TD, every = vectors(90), tokens(90, sequences=1)

    def moved(parts: list[slice], reduce: object = alone) -> Tensor:
        built = layer(config)
        reports = [built(x_TD[part], tokens(x_TD[part].shape[0]), TRAINING).report for part in parts]
        total = functools.reduce(lambda a, b: a + b, [report.margins for report in reports])
        wanted_E = reduce(sum(report.wanted_E for report in reports))
        built.balance.step(Taken(wanted_E, margins=total, reduce=reduce))
        return built.balance.bias_E

    whole = moved([slice(None)])
    assert torch.equal(moved([slice(31), slice(31, None)]), whole)
    ranks = together([functools.partial(moved, [part]) for part in (slice(40), slice(40, None))])
    assert all(torch.equal(found, whole) for found in ranks)
    assert every.count == 90


def test_evaluation_gathers_nothing_and_weights_know_no_bias() -> None:
    router = Router(score=Sigmoid(), offset="scores", select=TopK(k=EXPERTS - 1))
    built = layer(moe(router, balance=BalanceConfig(bias=QuantileBias())))
    for mode in (LayerMode(), LayerMode(training=True, counts_only=True)):
        assert built(vectors(9), tokens(9), mode).report.margins is None
    result = built(vectors(9), tokens(9), TRAINING)
    chosen_TK = result.routing.scores_TE.gather(1, result.routing.experts_TK)
    assert torch.allclose(result.routing.weights_TK, chosen_TK / chosen_TK.sum(dim=1, keepdim=True))
    assert not result.report.margins.parts[0].requires_grad
