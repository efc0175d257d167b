"""Groups of processes: sums, agreement, words, exchanges with uneven splits."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from consilium.errors import ConsiliumError
from consilium.parallel.exchange import Route, begin
from consilium.parallel.group import Group
from consilium.parallel.mesh import ALONE, Mesh
from consilium.parallel.topology import Topology, share
from consilium.parallel.watch import PeerLost
from processes import forked_alone, together

FOUR = Topology(data=2, expert=2)


def test_topologies_count_experts_fastest() -> None:
    topology = Topology.of(8, expert=2, replicas=2)
    assert topology == Topology(replicas=2, data=2, expert=2)
    assert [topology.place(rank) for rank in (0, 1, 2, 7)] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 1, 1)]
    assert [list(share(6, i, 3)) for i in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_processes_or_experts_that_cannot_be_dealt_are_refused() -> None:
    with pytest.raises(ConsiliumError, match=r"4 processes cannot be dealt into groups of 3"):
        Topology.of(4, expert=3)
    with pytest.raises(ConsiliumError, match="8 experts cannot be dealt evenly over 3 processes"):
        share(8, 0, 3)


def test_a_group_of_one_gives_back_what_it_gets() -> None:
    alone = ALONE.world
    value = torch.tensor([1.5, -2])
    assert alone.sum(value) is value
    assert alone.any(True, False) == (True, False)
    assert alone.texts("a") == alone.agreed(lambda: "a") == ["a"]
    assert alone.led(lambda: "b") == "b"
    assert alone.of_first(0.1) == 0.1


def sums_and_words(mesh: Mesh) -> Mapping[str, Tensor]:
    world, rank = mesh.world, mesh.world.rank
    counts, share_of = world.sums(torch.tensor([2**52, rank]), torch.tensor(0.5 * rank))
    assert counts.dtype == torch.int64
    assert counts.tolist() == [2**54, 6]
    assert share_of.item() == 3
    assert world.any(rank == 2, False) == (True, False)
    (most,) = world.largest(torch.tensor([rank, -rank]))
    assert most.tolist() == [3, 0]
    assert world.texts("é" * rank) == ["", "é", "éé", "ééé"]
    assert world.led(lambda: f"from {rank}") == "from 0"
    assert world.of_first(rank + 0.1) == 0.1
    assert mesh.expert.texts(str(rank)) == [["0", "1"], ["2", "3"]][rank // 2]
    return {}


def test_sums_agreements_and_words_reach_every_process() -> None:
    together(FOUR, sums_and_words)


def mistakes(mesh: Mesh) -> Mapping[str, Tensor]:
    def work() -> str:
        if mesh.world.rank == 1:
            raise ConsiliumError("the folder is full.")
        return ""

    with pytest.raises(ConsiliumError, match=r"^the folder is full\."):
        mesh.world.agreed(work)

    def fault() -> str:
        if mesh.world.rank == 3:
            raise ZeroDivisionError
        return ""

    with pytest.raises(ZeroDivisionError if mesh.world.rank == 3 else PeerLost):
        mesh.world.agreed(fault)
    return {}


def test_the_mistake_of_one_process_is_told_by_all() -> None:
    together(FOUR, mistakes)


def sent(group: Group, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rank r gives p * r rows to process p, whose values say where they come from."""
    give = [p * group.rank for p in range(group.size)]
    count = sum(give)
    x_SD = torch.arange(count * 3, dtype=torch.bfloat16).view(count, 3) + 16 * group.rank
    weight_S1 = torch.full((count, 1), group.rank + 1.0, dtype=torch.float64)
    number_S1 = torch.arange(count, dtype=torch.int32)[:, None]
    route = Route.of(group, "test", give)
    travelling = begin(route, (x_SD * scale.bfloat16(), weight_S1 * scale.double(), number_S1), back="back")
    return travelling.finish()


def exchanges(mesh: Mesh) -> Mapping[str, Tensor]:
    """Compare what arrived, and the gradient of what was sent, with what the others must have done."""
    group = mesh.world
    scale = torch.ones((), requires_grad=True)
    x_GD, weight_G1, number_G1 = sent(group, scale)
    rows = [(q, group.rank * q) for q in range(group.size)]
    before = [sum(p * q for p in range(group.rank)) for q, _ in rows]
    numbers = [n + i for (q, count), n in zip(rows, before, strict=True) for i in range(count)]
    assert number_G1.flatten().tolist() == numbers
    assert weight_G1.flatten().tolist() == [q + 1.0 for q, count in rows for _ in range(count)]
    assert x_GD.dtype == torch.bfloat16
    firsts = [3 * n + 16 * q for (q, count), b in zip(rows, before, strict=True) for n in range(b, b + count)]
    assert x_GD[:, 0].tolist() == torch.tensor(firsts).bfloat16().tolist()
    (weight_G1.sum() * (group.rank + 1)).backward()
    # Rank r's weights are r + 1 and p * r of them meet a factor of p + 1.
    wanted = sum((p + 1) * p * group.rank * (group.rank + 1) for p in range(group.size))
    assert scale.grad is not None
    assert scale.grad.item() == wanted
    row, row_back = 8 + 4 + 3 * 2 + 6, 8 + 3 * 2 + 2
    left = sum(p * group.rank for p in range(group.size) if p != group.rank)
    arrived = sum(group.rank * q for q in range(group.size) if q != group.rank)
    assert group.ledger.sent["test"] == [left * row]
    assert group.ledger.sent["back"] == [arrived * row_back]
    return {}


def test_rows_of_several_dtypes_travel_as_one_message_and_gradients_come_back() -> None:
    together(Topology(data=3), exchanges)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_who_is_lost_while_a_weight_is_gathered_is_named(how: signal.Signals) -> None:
    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        linear = nn.Linear(4, 4, bias=False)
        mesh.sharding.shard(linear, (), ())
        if mesh.world.rank == 1:
            os.kill(os.getpid(), how)
        with pytest.raises(PeerLost, match=r"rank 1 did not answer in the collective 'gather of a weight'"):
            mesh.sharding.gathered(linear.weight)
        return {}

    forked_alone(Topology(data=2), work, lost=1, limit=2.0)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_who_waits_for_a_process_that_waits_for_the_lost_one_names_the_lost_one(how: signal.Signals) -> None:
    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        if mesh.world.rank == 3:
            os.kill(os.getpid(), how)
        group = mesh.world if mesh.world.rank == 1 else mesh.expert
        with pytest.raises(PeerLost, match=f"rank 3 did not answer .* so rank {mesh.world.rank} stops"):
            group.sum(torch.zeros(1))
        return {}

    forked_alone(FOUR, work, lost=3, limit=2.0)
