"""The block in halves against the block as a whole: values, gradients, reports, and what waits for what."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.config.model import Model
from consilium.config.moe import Capacity, MoE
from consilium.config.router import ExpertChoice, Jitter, Router, Sigmoid, TopK
from consilium.data.batch import Batch
from consilium.model.block import Block
from consilium.model.build import allocate
from consilium.model.decoder import Decoder
from consilium.model.overlapped import OverlappedBlock
from consilium.model.types import Inputs, Losses, Objective, Options
from consilium.moe.transport import Local, Returning, Sending
from consilium.moe.types import Mode, Routing
from small import DEEPSEEK, DENSE, SWITCH, lively, random_batch
from support import relative_error

GATES = 1e-6
"""Their products are float32, and may round otherwise where there are fewer tokens."""
PLAIN = dataclasses.replace(
    DENSE, moe=MoE(experts=4, width=16, router=Router(select=TopK(k=2))), layers=2, dense_first=1
)
LONG = dataclasses.replace(DEEPSEEK, max_length=512)


@functools.cache
def pair(config: Model) -> tuple[Decoder, Decoder]:
    """The same model of whole blocks and of blocks in halves, in float64 but for its gates."""
    found = [allocate(config, dtype=torch.float64, blocks=blocks) for blocks in (Block, OverlappedBlock)]
    state = lively(config).state_dict()
    for model in found:
        model.load_state_dict(state)
    return found[0], found[1]


def passed(model: Decoder, batch: Batch, **options: Any) -> tuple[Losses, dict[str, torch.Tensor]]:
    """Losses, and gradients of their sum with every balance loss."""
    mode = Mode(training=True, generator=torch.Generator().manual_seed(5))
    losses = model(
        Inputs.of(batch),
        options=Options(mode=mode, routings=True, peaks_above=0.0, **options),
        objective=Objective(batch.targets_BS),
    )
    total = losses.nll + sum(losses.ahead) + sum(sum(r.losses.values()) for r in losses.reports.values())
    model.zero_grad()
    total.backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(config: Model, batch: Batch, **options: Any) -> None:
    whole, halves = pair(config)
    (ours, grads), (expected, wanted) = passed(halves, batch, **options), passed(whole, batch, **options)
    assert relative_error(ours.nll, expected.nll) < GATES
    assert grads.keys() == wanted.keys()
    total = sum(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in wanted.items():  # that of a query to one key is zero but for rounding
        assert (grads[name] - gradient).norm() < GATES * max(float(gradient.norm()), 1e-9 * total), name
    assert ours.reports.keys() == expected.reports.keys()
    for layer, report in expected.reports.items():
        assert torch.equal(ours.reports[layer].load_E, report.load_E)
        assert torch.equal(ours.routings[layer].experts_TK, expected.routings[layer].experts_TK)
        for name, loss in report.losses.items():
            assert relative_error(ours.reports[layer].losses[name], loss) < GATES, name
    assert ours.largest.keys() == expected.largest.keys()
    for layer, largest_H in expected.largest.items():  # exact above 0, which was asked for
        assert relative_error(ours.largest[layer].clamp(min=0), largest_H.clamp(min=0)) < GATES


def padded(batch: Batch) -> Batch:
    """The last sequence has nothing real, and the first ends early."""
    valid_BS = torch.ones_like(batch.valid_BS)
    valid_BS[-1] = False
    valid_BS[0, -3:] = False
    targets_BS = batch.targets_BS.masked_fill(~valid_BS, -1)
    targets_BS[0, -4] = -1
    return dataclasses.replace(batch, valid_BS=valid_BS, targets_BS=targets_BS)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("config", [DEEPSEEK, SWITCH, DENSE], ids=["deepseek", "switch", "dense"])
def test_halves_are_the_whole_in_values_gradients_and_reports(config: Model, *, recompute: bool) -> None:
    assert_same(config, random_batch(4, 12), recompute=recompute)


@settings(max_examples=12)
@given(rows=st.integers(1, 5), length=st.sampled_from([1, 2, 7]), seed=st.integers(0, 10**6))
def test_any_number_of_rows_and_lengths(rows: int, length: int, seed: int) -> None:
    assert_same(DEEPSEEK, random_batch(rows, length, seed=seed))


def test_padding_of_a_whole_half() -> None:
    assert_same(DEEPSEEK, padded(random_batch(2, 9)))


def test_long_rows_of_documents_and_rows_of_one() -> None:
    """Beyond the length up to which documents are told apart by a mask."""
    assert_same(LONG, random_batch(3, 260))
    one = dataclasses.replace(random_batch(3, 6), sequence_BS=torch.zeros(3, 6, dtype=torch.int64))
    assert_same(LONG, one)


def changed(**parts: object) -> Model:
    assert PLAIN.moe is not None
    return dataclasses.replace(PLAIN, moe=dataclasses.replace(PLAIN.moe, **parts))


def waiting() -> Iterator[Model]:
    """Routers and admissions that read more than a token, or draw noise."""
    assert PLAIN.moe is not None
    router = PLAIN.moe.router
    assert PLAIN.moe.divisible
    yield changed(admission=Capacity(factor=0.6))
    yield changed(router=dataclasses.replace(router, noise=Jitter()))
    yield changed(router=dataclasses.replace(router, score=Sigmoid(), select=ExpertChoice(factor=1.0)))


@pytest.mark.parametrize("config", tuple(waiting()), ids=["capacity", "noise", "expert choice"])
def test_what_reads_more_than_a_token_is_routed_whole(config: Model) -> None:
    assert config.moe is not None
    assert not config.moe.divisible
    assert_same(config, random_batch(4, 12))


@dataclass
class Told:
    """A transport of one process that notes what happens when, and a pass that notes attention."""

    notes: list[str] = field(default_factory=list)

    def owned(self, experts: int) -> range:
        return range(experts)

    def dispatch(self, x_TD: torch.Tensor, routing: Routing) -> Sending[torch.dtype]:
        self.notes.append("send")
        return Noted(Local().dispatch(x_TD, routing), "rows", self.notes)

    def combine(self, y_TD: torch.Tensor, ticket: torch.dtype) -> Returning:
        self.notes.append("return")
        return Noted(Local().combine(y_TD, ticket), "sums", self.notes)


@dataclass
class Noted:
    of: Any
    name: str
    notes: list[str]

    def finish(self) -> Any:
        self.notes.append(self.name)
        return self.of.finish()


def test_what_travels_is_waited_for_after_the_other_half_was_computed() -> None:
    told = Told()
    block = partial(OverlappedBlock, transports=lambda layer: told)
    model = allocate(PLAIN, dtype=torch.float32, blocks=block)
    model.load_state_dict(lively(model.config).state_dict())
    routed = model.layers[1]
    routed.attention.register_forward_hook(lambda *_: told.notes.append("attention"))
    routed.moe.experts.register_forward_hook(lambda *_: told.notes.append("experts"))
    ids_BS = random_batch(2, 6).ids_BS
    model(ids_BS, options=Options(Mode(training=True)))
    first = ["attention", "send", "attention", "send"]
    assert told.notes == [*first, "rows", "experts", "return", "rows", "experts", "return", "sums", "sums"]
    told.notes.clear()
    model(ids_BS)
    assert told.notes == ["attention", "send", "rows", "experts", "return", "sums"]
