"""Experts over several processes against all of them in one: outputs, gradients, loads, bytes.

Each process routes tokens of its own, as a micro-batch of its own; the twin in one process does one after
the other and adds gradients up.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from consilium.config.moe import MoE
from consilium.config.router import Groups, Raw, Router, Sigmoid, TopK
from consilium.moe.all_to_all import over
from consilium.moe.layer import MoELayer
from consilium.moe.types import LayerMode, Routing
from consilium.parallel.group import Group
from consilium.parallel.mesh import Mesh
from consilium.parallel.topology import Topology
from consilium.planner.exchange import Crossing, exchange_bytes, most_processes
from moe.cases import HIDDEN, SYSTEMS, layer, moe, tokens, vectors
from processes import together
from support import relative_error

COUNTS = (5, 23, 0, 8)
"""Tokens of each process; one has none."""


def dealt(whole: MoELayer, config: MoE, group: Group) -> MoELayer:
    """The layer with the experts of this process only."""
    part = MoELayer(config, HIDDEN, 0, over(group))
    owned = part.experts.owned
    state = whole.state_dict()
    for name in ("experts.up", "experts.down"):
        state[name] = state[name][owned.start : owned.stop]
    part.load_state_dict(state)
    return part


def reached(routing: Routing, processes: int) -> list[list[int]]:
    """Of each token the processes that its row goes to."""
    local = routing.logits_TE.shape[1] // processes
    kept = zip(routing.experts_TK.tolist(), routing.keep_TK.tolist(), strict=True)
    return [
        sorted({e // local for e, keep in zip(experts, keeps, strict=True) if keep})
        for experts, keeps in kept
    ]


def run(built: MoELayer, count: int, seed: int, *, recompute: bool = False) -> tuple[Tensor, Tensor, Routing]:
    """Output, gradient of the input and the routing; gradients of parameters add up."""
    x_TD = vectors(count, seed=seed).requires_grad_()
    every = tokens(count, padding=count // 4)
    call = (lambda x: checkpoint(built, x, every, LayerMode(), use_reentrant=False)) if recompute else None
    result = built(x_TD, every, LayerMode()) if call is None else call(x_TD)
    result.y_TD.backward(vectors(count, seed=seed + 50))
    assert x_TD.grad is not None
    return result.y_TD, x_TD.grad, result.routing


def equals_one_process(name: str, config: MoE, group: Group, *, recompute: bool) -> None:
    whole = layer(config)
    part = dealt(whole, config, group)
    group.ledger.clear()
    y_TD, grad_TD, routing = run(part, COUNTS[group.rank], group.rank, recompute=recompute)
    sent = dict(group.ledger.sent)
    ways: list[list[list[int]]] = []
    for rank in range(group.size):
        expected_TD, expected_grad_TD, decision = run(whole, COUNTS[rank], rank)
        ways.append(reached(decision, group.size))
        if rank == group.rank:
            assert relative_error(y_TD, expected_TD) < 1e-5, name
            assert relative_error(grad_TD, expected_grad_TD) < 1e-5, name
            assert torch.equal(routing.load_E(), decision.load_E()), name
    for key, parameter in part.named_parameters():
        wanted = whole.get_parameter(key).grad
        if key.startswith("experts."):
            assert parameter.grad is not None, name
            total = parameter.grad
            wanted = wanted[part.experts.owned.start : part.experts.owned.stop]
        else:
            total = group.sum(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        assert relative_error(total, torch.zeros_like(total) if wanted is None else wanted) < 2e-5, (
            name,
            key,
        )
    if not recompute:
        bytes_equal_the_plan(name, config, group, ways, sent)


def bytes_equal_the_plan(
    name: str, config: MoE, group: Group, ways: list[list[list[int]]], sent: Mapping[str, list[int]]
) -> None:
    me = group.rank
    leaving = sum(process != me for way in ways[me] for process in way)
    arriving = sum(me in way for rank, of in enumerate(ways) if rank != me for way in of)
    plan = exchange_bytes(config, HIDDEN, Crossing(leaving, arriving), processes=group.size)
    assert sent == {
        "counts": [plan.counts],
        "dispatch": [plan.dispatch],
        "combine": [plan.combine],
        "dispatch, backward": [plan.dispatch_back],
        "combine, backward": [plan.combine_back],
    }, name
    assert all(len(way) <= most_processes(config, group.size) for of in ways for way in of), name


@pytest.mark.parametrize("processes", [2, 4])
def test_every_system_is_the_same_with_its_experts_over_processes(processes: int) -> None:
    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        for name, config in SYSTEMS.items():
            equals_one_process(name, config, mesh.expert, recompute=False)
        for name in ("deepseek-v3", "llama-4"):
            equals_one_process(name, SYSTEMS[name], mesh.expert, recompute=True)
        return {}

    together(Topology(expert=processes), work)


def v2_and_v3() -> dict[str, tuple[MoE, int]]:
    """Sixteen experts in eight groups, a process each of four or two: V2 keeps 3 of them and V3 4."""
    keeps = {"v2": (3, "max", Raw()), "v3": (4, "top2_sum", Raw())}
    return {
        name: (
            MoE(
                experts=16,
                width=4,
                router=Router(
                    score=Sigmoid(),
                    select=TopK(k=6, groups=Groups(count=8, keep=keep, score=score)),
                    weight=weight,
                ),
            ),
            keep,
        )
        for name, (keep, score, weight) in keeps.items()
    }


def test_a_limited_router_sends_a_token_to_few_processes() -> None:
    for config, keep in v2_and_v3().values():
        built = layer(config)
        with torch.no_grad():
            routing = built(vectors(200), tokens(200), LayerMode()).routing
        counts = [len(way) for way in reached(routing, 8)]
        assert max(counts) == keep == most_processes(config, 8)


def test_experts_nobody_chooses_get_zero_gradients_and_nobody_waits() -> None:
    """A hundred steps in which one process gets no row, and in the last ones another has no tokens."""
    config = moe(Router(score=Sigmoid(), offset="scores", select=TopK(k=2), weight=Raw()))

    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        part = dealt(layer(config), config, mesh.expert)
        assert part.balance.bias_E is not None
        with torch.no_grad():
            part.balance.bias_E.copy_(torch.tensor([50.0] * 4 + [-50.0] * 4))
        plan = exchange_bytes(config, HIDDEN, Crossing(5, 0), processes=2)
        for step in range(100):
            part.zero_grad()
            run(part, 0 if step > 90 and mesh.expert.rank == 0 else 6, step)
            if mesh.expert.rank == 1:
                # All go to the other process: one row a valid token, however many experts it has there.
                assert mesh.ledger.sent["dispatch"][-1] == plan.dispatch
            if mesh.expert.rank == 1:
                assert part.experts.up.grad is not None
                assert not part.experts.up.grad.any()
                assert not part.experts.down.grad.any()
        assert len(mesh.ledger.sent["dispatch"]) == 100
        return {}

    together(Topology(expert=2), work)


def test_partial_sums_come_back_in_float32() -> None:
    """256 from one process and 1 from the other, in bfloat16, is 257 before the one rounding at the end."""
    config = moe(Router(score=Sigmoid(), select=TopK(k=8), weight=Raw()))

    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        part = dealt(layer(config).to(torch.bfloat16), config, mesh.expert).to(torch.bfloat16)
        with torch.no_grad():
            result = part(vectors(9).bfloat16(), tokens(9), LayerMode())
            whole = layer(config).to(torch.bfloat16)(vectors(9).bfloat16(), tokens(9), LayerMode())
        assert result.y_TD.dtype == torch.bfloat16
        off = (result.y_TD.float() - whole.y_TD.float()).abs().max() / whole.y_TD.float().abs().max()
        assert off <= 2**-8
        plan = exchange_bytes(config, HIDDEN, Crossing(9, 9), processes=2, itemsize=2)
        assert (mesh.ledger.sent["dispatch"], mesh.ledger.sent["combine"]) == (
            [plan.dispatch],
            [plan.combine],
        )
        return {}

    together(Topology(expert=2), work)
