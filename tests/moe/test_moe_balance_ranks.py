"""Losses over a step: what micro-batches and ranks add up to, in float64 and for any cut of the tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.config.balance import Balance as BalanceConfig
from consilium.config.balance import (
    BalanceLoss,
    CommunicationLoss,
    DeviceLoss,
    SequenceLoss,
    SwitchLoss,
    ZLoss,
)
from consilium.config.router import Router, Sigmoid, TopK
from consilium.moe.balance import Balance
from consilium.moe.types import Average, Counted, LayerMode, Reduce, Report, Routing, Tokens, alone
from moe.cases import decision, some_tokens, tokens
from moe.ranks import together
from support import relative_error

E, K, T = 6, 2, 36
ROUTER = Router(score=Sigmoid(), select=TopK(k=K))
WHOLE: tuple[BalanceLoss, ...] = (
    SwitchLoss(coefficient=0.7, scope="step"),
    DeviceLoss(coefficient=0.7, devices=3, scope="step"),
    CommunicationLoss(coefficient=0.7, devices=3, most=2, scope="step"),
    ZLoss(coefficient=0.7),
)
BY_SEQUENCE: tuple[BalanceLoss, ...] = (
    SequenceLoss(coefficient=0.7),
    SequenceLoss(coefficient=0.7, counts="scores"),
    DeviceLoss(coefficient=0.7, devices=3, scope="sequence"),
    CommunicationLoss(coefficient=0.7, devices=3, most=2),
)


def made(seed: int) -> tuple[Tensor, Tokens]:
    """Logits in float64 and tokens of which some are padding."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(T, E, generator=generator, dtype=torch.float64)
    every = tokens(T, sequences=6, seed=seed)
    return logits_TE, replace(every, valid_T=torch.rand(T, generator=generator) < 0.8)


def routed(logits_TE: Tensor, every: Tokens) -> Routing:
    scores_TE = logits_TE.sigmoid()
    experts_TK = scores_TE.detach().topk(K, dim=1).indices
    keep_TK = every.valid_T[:, None].expand(-1, K)
    return decision(scores_TE, experts_TK, keep_TK, logits_TE=logits_TE)


def cut(every: Tokens, parts: Sequence[slice]) -> list[Tokens]:
    cuts = [some_tokens(every, torch.arange(T)[part]) for part in parts]
    return [replace(one, sequence_T=one.sequence_T - one.sequence_T.min()) for one in cuts]


def average(every: Tokens, parts: int) -> Average:
    sequences = len(set(every.sequence_T[every.valid_T].tolist()))
    return Average(int(every.valid_T.sum()) / parts, sequences / parts, sequences / parts)


def reported(loss: BalanceLoss, logits_TE: Tensor, every: Tokens, mode: LayerMode) -> Report:
    balance = Balance(BalanceConfig(losses=(loss,)), ROUTER, E)
    return balance(routed(logits_TE, every), every, mode)


def counted(loss: BalanceLoss, logits_TE: Tensor, every: Tokens) -> Counted:
    return reported(loss, logits_TE, every, LayerMode(training=True, counts_only=True)).counted


def differentiated(value: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(value, logits_TE)
    return value.detach(), gradient


def in_parts(loss: BalanceLoss, seed: int, parts: Sequence[slice]) -> tuple[Tensor, Tensor]:
    """The mean over micro-batches of one rank, which have counted ahead."""
    logits_TE, every = made(seed)
    logits_TE.requires_grad_()
    cuts = cut(every, parts)
    each = [counted(loss, logits_TE[part], one) for part, one in zip(parts, cuts, strict=True)]
    whole = functools.reduce(lambda a, b: a + b, each)
    mode = LayerMode(training=True, whole=whole, average=average(every, len(parts)))
    values = [
        reported(loss, logits_TE[part], one, mode).losses[loss.kind]
        for part, one in zip(parts, cuts, strict=True)
    ]
    return differentiated(sum(values) / len(parts), logits_TE)


PARTS = {
    "halves": [slice(0, 18), slice(18, 36)],
    "quarters": [slice(0, 6), slice(6, 18), slice(18, 30), slice(30, 36)],
}


@pytest.mark.parametrize("loss", WHOLE + BY_SEQUENCE, ids=repr)
@given(seed=st.integers(0, 10**6), parts=st.sampled_from(list(PARTS.values())))
def test_micro_batches_of_any_size_add_up_to_the_step(
    loss: BalanceLoss, seed: int, parts: list[slice]
) -> None:
    """To 1e-9 in float64, in values and gradients, with unequal numbers of valid tokens in the parts."""
    (whole, slope), (found, found_slope) = (in_parts(loss, seed, cuts) for cuts in ([slice(0, T)], parts))
    assert relative_error(found, whole) < 1e-9
    assert relative_error(found_slope, slope) < 1e-9


def on_rank(
    loss: BalanceLoss, seed: int, parts: Sequence[slice], rank: int, reduce: Reduce
) -> tuple[Tensor, Tensor]:
    """One pass of each rank: what is counted goes through ``reduce``."""
    logits_TE, every = made(seed)
    logits_TE.requires_grad_()
    mode = LayerMode(training=True, average=average(every, len(parts)), reduce=reduce)
    report = reported(loss, logits_TE[parts[rank]], cut(every, parts)[rank], mode)
    return differentiated(report.losses[loss.kind] / len(parts), logits_TE)


@pytest.mark.parametrize(
    "loss", [*WHOLE, SwitchLoss(coefficient=0.7, scope="global"), *BY_SEQUENCE], ids=repr
)
@pytest.mark.parametrize("name", PARTS)
def test_ranks_add_up_to_the_step(loss: BalanceLoss, name: str) -> None:
    """With one micro-batch a rank "global" is the step as well."""
    parts = PARTS[name]
    ranks = together([functools.partial(on_rank, loss, 3, parts, rank) for rank in range(len(parts))])
    as_one = replace(loss, scope="step") if isinstance(loss, SwitchLoss) else loss
    whole, slope = in_parts(as_one, 3, [slice(0, T)])
    assert relative_error(sum(value for value, _ in ranks), whole) < 1e-9
    assert relative_error(sum(gradient for _, gradient in ranks), slope) < 1e-9


def test_counts_of_ranks_are_asked_for_once_and_keep_their_parts() -> None:
    asked = []

    def twice(values: Tensor) -> Tensor:
        asked.append(values.shape)
        return 2 * values

    whole = Counted(torch.tensor([1, 2, 3]), torch.tensor(6), torch.tensor([4, 5])).over(twice)
    assert asked == [(6,)]
    assert [getattr(whole, field.name).tolist() for field in fields(Counted)] == [[2, 4, 6], 12, [8, 10]]
    assert Counted(torch.tensor([1]), torch.tensor(1)).over(alone).sent_N is None
