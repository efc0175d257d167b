"""What a selection promises whatever the scores: devices a token may reach, and Sinkhorn's balanced plan.

Legend: T tokens, E experts, K choices a token, G groups.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.config.moe import MoE
from consilium.config.router import Groups, Raw, Router, Score, Sigmoid, Sinkhorn, Softmax, TopK
from consilium.moe.routing.select import Evidence, choose
from consilium.moe.types import LayerMode, Override
from moe.cases import layer, moe, tokens, vectors

TRAINING = LayerMode(training=True)
V2 = TopK(k=6, groups=Groups(count=8, keep=3, score="max"))
"""DeepSeek-V2's M = 3 of 8 devices (2405.04434 section 2.2.2)."""
V3 = TopK(k=8, groups=Groups(count=8, keep=4, score="top2_sum"))
"""DeepSeek-V3's 4 of 8 nodes (2412.19437 section 2.1.2)."""


@given(
    seed=st.integers(0, 10**6),
    select=st.sampled_from([V2, V3]),
    kind=st.sampled_from(["any", "ties", "one hot", "huge", "nan", "equal"]),
    bias=st.sampled_from([0.0, -2.0, -1e4, 3.0]),
    muted=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    training=st.booleans(),
)
def test_no_token_reaches_more_devices_than_it_may(
    seed: int, select: TopK, kind: str, bias: float, muted: float, *, training: bool
) -> None:
    experts, count = 32, 12
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.randn(count, experts, generator=generator)
    match kind:
        case "ties":
            scores_TE = scores_TE.round()
        case "one hot":
            scores_TE = torch.nn.functional.one_hot(torch.arange(count), experts).float()
        case "huge":
            scores_TE = scores_TE * 1e30
        case "nan":
            scores_TE[torch.rand(count, experts, generator=generator) < 0.2] = math.nan
        case "equal":
            scores_TE = torch.zeros_like(scores_TE)
        case _:
            pass
    bias_E = bias * torch.rand(experts, generator=generator)
    mute_TE = torch.rand(count, experts, generator=generator) < muted
    mode = LayerMode(training=training, override=Override(mute_TE=mute_TE))
    evidence = Evidence(scores_TE + bias_E, scores_TE, scores_TE)
    choice = choose(select, evidence, tokens(count, padding=2), mode)
    groups = select.groups
    assert groups is not None
    for row, wanted in zip(choice.experts_TK.tolist(), choice.wanted_TK.tolist(), strict=True):
        used = [expert for expert, ok in zip(row, wanted, strict=True) if ok]
        assert len({expert // (experts // groups.count) for expert in used}) <= groups.keep
        assert len(set(used)) == len(used) <= select.k


def routing(score: Score, k: int, iterations: int = 60) -> MoE:
    return moe(Router(score=score, select=Sinkhorn(k=k, iterations=iterations), weight=Raw()))


def naive_choices(logits_TE: Tensor, valid: list[bool], k: int, iterations: int) -> list[set[int]]:
    """Scale rows to 1 and columns to T/E in turn, in plain loops, and take the k highest of each row."""
    rows = [[math.exp(v) for v in row] for row, ok in zip(logits_TE.tolist(), valid, strict=True) if ok]
    experts = logits_TE.shape[1]
    for _ in range(iterations):
        rows = [[v / sum(row) for v in row] for row in rows]
        sums = [sum(row[e] for row in rows) for e in range(experts)]
        rows = [[row[e] / sums[e] * len(rows) / experts for e in range(experts)] for row in rows]
    return [set(sorted(range(experts), key=lambda e, row=row: -row[e])[:k]) for row in rows]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("score", [Softmax(), Sigmoid()], ids=lambda score: score.kind)
def test_sinkhorn_chooses_in_the_plan_of_plain_loops(score: Score, k: int) -> None:
    built = layer(routing(score, k, iterations=15))
    x_TD, every = vectors(40), tokens(40, padding=7)
    x_TD[33:] = 30.0
    result = built(x_TD, every, TRAINING)
    expected = naive_choices(result.routing.logits_TE, every.valid_T.tolist(), k, 15)
    assert [set(row) for row in result.routing.experts_TK[:33].tolist()] == expected
    assert not result.routing.wanted_TK[33:].any()
    scores_TK = result.routing.scores_TE.gather(1, result.routing.experts_TK)
    assert torch.equal(result.routing.weights_TK[:33], scores_TK[:33])


@pytest.mark.parametrize("score", [Softmax(), Sigmoid()], ids=lambda score: score.kind)
def test_sinkhorn_balances_training_and_leaves_evaluation_alone(score: Score) -> None:
    built = layer(routing(score, 2))
    x_TD = vectors(512) + 2 * built.router.projection.weight[0].detach()
    every = tokens(512)
    loads = {
        mode.training: built(x_TD, every, mode).report.load_E.float() for mode in (TRAINING, LayerMode())
    }
    assert (loads[True].max() / loads[True].mean()).item() < 1.5
    assert (loads[False].max() / loads[False].mean()).item() > 2.5
    plain = layer(moe(Router(score=score, select=TopK(k=2), weight=Raw())))
    served = built(x_TD, every, LayerMode()).routing
    assert torch.equal(served.experts_TK, plain(x_TD, every, LayerMode()).routing.experts_TK)


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.0, 1.0, 100.0, 1e4]), count=st.integers(0, 9))
def test_sinkhorn_chooses_open_experts_of_any_logits(seed: int, scale: float, count: int) -> None:
    """Extreme gaps, ties, few tokens, an expert closed to all, and tokens with nothing open."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = scale * torch.randn(count, 6, generator=generator)
    mute_TE = torch.rand(count, 6, generator=generator) < 0.5
    mute_TE[:, 4] = True
    mode = LayerMode(training=True, override=Override(mute_TE=mute_TE))
    evidence = Evidence(logits_TE.sigmoid(), logits_TE.sigmoid(), logits_TE)
    choice = choose(Sinkhorn(k=2), evidence, tokens(count), mode)
    open_TK = ~mute_TE.gather(1, choice.experts_TK)
    assert torch.equal(choice.wanted_TK, open_TK)
    assert torch.equal(choice.wanted_TK.sum(dim=1), (~mute_TE).sum(dim=1).clamp_max(2))


def test_a_plan_depends_on_later_tokens_in_training_alone() -> None:
    config = routing(Softmax(), 2)
    assert config.causal
    assert config.independent
    assert not config.causal_in_training
