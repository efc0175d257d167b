"""What a layer asks of the device: only how many rows each expert has, and counts that no order changes.

On the meta device there are no values: whatever reads one raises. A layer whose transport knows the counts
runs there from end to end, so nothing else of it waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from consilium.config.balance import (
    SMEBU,
    Balance,
    BalanceLoss,
    BiasRule,
    CommunicationLoss,
    DeviceLoss,
    ImportanceLoss,
    LinearBias,
    PIDBias,
    QuantileBias,
    SequenceLoss,
    SignBias,
    SwitchLoss,
    ZLoss,
)
from consilium.config.moe import Capacity, DeviceCapacity, MoE
from consilium.config.router import NoGate, Router, Sigmoid, Sinkhorn, TopK, TwoLevel
from consilium.moe.layer import MoELayer
from consilium.moe.ordering import capacities, capacity, highest
from consilium.moe.transport import Local
from consilium.moe.types import LayerMode, Override, Routing, Taken, Tokens
from consilium.ops.counting import occurrences
from consilium.ops.rows import ByToken, Rows
from moe.cases import EXPERTS, HIDDEN, SYSTEMS, layer, moe, tokens, vectors
from support import relative_error

LOSSES: tuple[BalanceLoss, ...] = (
    SwitchLoss(),
    SequenceLoss(),
    SequenceLoss(counts="scores"),
    DeviceLoss(devices=4),
    CommunicationLoss(devices=4, most=2),
    SwitchLoss(scope="global"),
    DeviceLoss(devices=4, scope="step"),
    CommunicationLoss(devices=4, most=2, scope="global"),
    ImportanceLoss(),
)
MOVED = Router(score=Sigmoid(), offset="scores", select=TopK(k=2))
BUSY = SYSTEMS | {
    "sinkhorn": moe(Router(select=Sinkhorn(k=2))),
    "quantile": moe(MOVED, balance=Balance(bias=QuantileBias())),
    "histogram": moe(MOVED, balance=Balance(bias=QuantileBias(statistics="histogram"))),
}
ADMISSIONS = (None, Capacity(factor=0.5, group_tokens=5), DeviceCapacity(devices=4, exempt=0.3))


@dataclass
class Known:
    """A transport that knows beforehand how many rows come: three an expert. Its ticket is a number."""

    layer: int
    finished: int = 0

    def owned(self, experts: int) -> range:
        return range(experts)

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Known:
        token_R = torch.arange(3 * EXPERTS, device=x_TD.device) % x_TD.shape[0]
        used_T = torch.ones(x_TD.shape[0], dtype=torch.int64, device=x_TD.device)
        weight_R = routing.weights_TK.flatten().index_select(0, token_R)
        self.rows = Rows(x_TD, ByToken.of(token_R, token_R, used_T), weight_R, (3,) * EXPERTS)
        self.count = x_TD.shape[0]
        return self

    def finish(self) -> tuple[Rows, int]:
        self.finished += 1
        return self.rows, self.count

    def combine(self, y_TD: Tensor, ticket: int) -> Sum:
        return Sum(y_TD.new_empty(ticket, y_TD.shape[1]))


@dataclass
class Sum:
    y_TD: Tensor

    def finish(self) -> Tensor:
        return self.y_TD


def on_meta(every: Tokens) -> Tokens:
    names = ("ids_T", "sequence_T", "position_T", "valid_T")
    return replace(every, **{name: getattr(every, name).to("meta") for name in names})


def busy(name: str, admission: Capacity | DeviceCapacity | None) -> MoE:
    config = BUSY[name]
    losses = () if isinstance(config.router.projection, NoGate) else LOSSES
    losses += () if isinstance(config.router.select, TwoLevel | NoGate) or not losses else (ZLoss(),)
    balance = replace(config.balance, losses=losses)
    return replace(config, admission=admission or config.admission, balance=balance)


@pytest.mark.parametrize("admission", ADMISSIONS, ids=["own", "capacity", "devices"])
@pytest.mark.parametrize("name", BUSY)
def test_a_layer_reads_nothing_of_its_device_beside_what_dispatch_needs(
    name: str, admission: Capacity | DeviceCapacity | None
) -> None:
    with torch.device("meta"):
        built = MoELayer(busy(name, admission), HIDDEN, 4, Known)
        mute_TE = torch.zeros(1, EXPERTS, dtype=torch.bool)
    mode = LayerMode(training=True, override=Override(mute_TE=mute_TE))
    result = built(vectors(20).to("meta"), on_meta(tokens(20, padding=3)), mode)
    assert built.transport == Known(4, finished=1)
    assert result.y_TD.shape == (20, HIDDEN)
    assert result.report.layer == 4


class Looks(TorchDispatchMode):
    """Counts operations that stop the host where tensors are on another device."""

    NAMES = ("_local_scalar_dense", "nonzero", "bincount", "_unique2", "masked_select", "index")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.seen += [name] if name in self.NAMES and (name != "index" or masks) else []
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["deepseek-v3", "gshard", "llama-4", "relu"])
def test_a_dispatch_and_its_return_read_the_counts_and_nothing_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``tolist`` is not an operation, so it is counted by itself."""
    built, lists, tolist = layer(SYSTEMS[name]), [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: lists.append(tensor.shape) or tolist(tensor))
    routing, x_TD = built(vectors(30), tokens(30, padding=4), LayerMode()).routing, vectors(30)
    lists.clear()
    with Looks() as looks:
        rows, ticket = Local().dispatch(x_TD, routing).finish()
        Local().combine(rows.outputs(rows.inputs()), ticket).finish()
    assert looks.seen == []
    assert lists == [(EXPERTS,)]


@given(data=st.data(), size=st.integers(1, 9), shape=st.tuples(st.integers(0, 20), st.integers(1, 3)))
def test_counting_by_additions_is_bincount(data: st.DataObject, size: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    index_TK = torch.randint(size, shape, generator=generator)
    mask_TK = torch.rand(shape, generator=generator) < 0.6
    assert torch.equal(occurrences(index_TK, size), torch.bincount(index_TK.flatten(), minlength=size))
    assert torch.equal(
        occurrences(index_TK, size, mask_TK), torch.bincount(index_TK[mask_TK], minlength=size)
    )


@given(st.floats(0.01, 8), st.integers(0, 10**6), st.integers(1, 64), st.integers(1, 512))
def test_capacities_on_a_device_are_those_of_the_host(
    factor: float, count: int, k: int, experts: int
) -> None:
    assert capacities(factor, torch.tensor([count]), k, experts).tolist() == [
        capacity(factor, count, k, experts)
    ]


def test_the_order_of_another_device_is_that_of_the_processor() -> None:
    """There no look at the values chooses the quick way: a stable sort, of which the quick way is a twin."""
    values = torch.randint(4, (50, 9), generator=torch.Generator().manual_seed(0)).float()
    sorted_ = values.sort(dim=1, descending=True, stable=True).indices
    for k in range(10):
        assert torch.equal(highest(values, k), sorted_[:, :k])
        assert highest(values.to("meta"), k).shape == (50, k)


def test_a_step_of_decoding_asks_for_counts_alone() -> None:
    built, every, x_TD = layer(SYSTEMS["deepseek-v3"]), tokens(9), vectors(9)
    full = built(x_TD, every, LayerMode()).report
    brief = built(x_TD, every, LayerMode(counts_only=True)).report
    assert full.entropy is not None
    assert brief.entropy is None
    assert torch.equal(brief.load_E, full.load_E)


RULES: tuple[BiasRule, ...] = (
    SignBias(rate=0.1),
    LinearBias(rate=0.1),
    SMEBU(rate=0.1),
    PIDBias(),
    QuantileBias(),
    QuantileBias(statistics="histogram"),
)


def moved(config: MoE, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Experts of a layer after its bias has moved twice, and its balance state."""
    built, every, x_TD = layer(config).to(device), tokens(200, padding=9), vectors(200).to(device)
    names = ("ids_T", "sequence_T", "position_T", "valid_T")
    every = replace(every, **{name: getattr(every, name).to(device) for name in names})
    for _ in range(2):
        report = built(x_TD, every, LayerMode(training=True)).report
        built.balance.step(Taken(report.wanted_E, margins=report.margins))
    routing = built(x_TD, every, LayerMode(training=True)).routing
    return routing.experts_TK.cpu(), {name: value.cpu() for name, value in built.balance.named_buffers()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_bias_moves_alike_on_both_devices(rule: BiasRule) -> None:
    config = moe(MOVED, balance=Balance(bias=rule))
    (here, state), (there, other) = moved(config, "cpu"), moved(config, "cuda")
    assert (here == there).double().mean() > 0.99
    assert state.keys() == other.keys()
    assert all(relative_error(other[name], value) < 1e-3 for name, value in state.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_a_plan_is_equal_on_both_devices() -> None:
    (here, _), (there, _) = (moved(BUSY["sinkhorn"], device) for device in ("cpu", "cuda"))
    assert (here == there).double().mean() > 0.99
