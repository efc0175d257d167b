"""All tokens of two processes to the experts of one: what its memory bears, and what a capacity drops.

Legend: T tokens of a process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from consilium.config.moe import DeviceCapacity, MoE
from consilium.config.router import Raw, Router, Sigmoid, TopK
from consilium.moe.all_to_all import over
from consilium.moe.layer import MoELayer
from consilium.moe.types import LayerMode, Report
from consilium.parallel.mesh import Mesh
from consilium.parallel.topology import Topology
from consilium.planner.exchange import Crossing, exchange_bytes
from consilium.planner.memory import activations
from moe.cases import tokens, vectors
from processes import together
from small import DEEPSEEK

HIDDEN, TOKENS = 256, 8192
CONFIG = MoE(
    experts=8, width=128, router=Router(score=Sigmoid(), offset="scores", select=TopK(k=2), weight=Raw())
)
DROPS = dataclasses.replace(CONFIG, admission=DeviceCapacity(devices=2, factor=1.0, exempt=0.0))
EVEN, ALL_TO_FIRST = [0.0] * 8, [50.0] * 4 + [-50.0] * 4
PROCESS = Path("/proc/self")


def peak() -> int:
    return int((PROCESS / "status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def peak_of_a_pass(config: MoE, mesh: Mesh, bias: list[float]) -> tuple[Report, int]:
    """A pass without gradients, and by how much it raised the largest memory of this process."""
    built = MoELayer(config, HIDDEN, 0, over(mesh.expert))
    assert built.balance.bias_E is not None
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
        built.balance.bias_E.copy_(torch.tensor(bias))
        x_TD, every = vectors(TOKENS, seed=mesh.expert.rank, hidden=HIDDEN), tokens(TOKENS)
        built(x_TD[:64], tokens(64), LayerMode(training=True))
        (PROCESS / "clear_refs").write_text("5")  # the largest so far is forgotten
        before = peak()
        report = built(x_TD, every, LayerMode(training=True)).report
        return report, peak() - before


def planned(arriving: int) -> int:
    """Bytes of ``arriving`` tokens in the process of their experts, and of rows on their way."""
    model = dataclasses.replace(DEEPSEEK, hidden_size=HIDDEN, moe=CONFIG)
    theirs = exchange_bytes(CONFIG, HIDDEN, Crossing(TOKENS, 0), processes=2)
    own = exchange_bytes(CONFIG, HIDDEN, Crossing(0, TOKENS), processes=2)
    return 4 * activations(model) * arriving + theirs.dispatch + own.combine


@pytest.mark.skipif(not (PROCESS / "clear_refs").exists(), reason="Linux alone tells the peak of a pass")
def test_a_process_that_gets_every_token_takes_what_is_planned_or_drops_the_rest_and_counts_it() -> None:
    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        even, all_, dropping = (
            peak_of_a_pass(config, mesh, bias)
            for config, bias in ((CONFIG, EVEN), (CONFIG, ALL_TO_FIRST), (DROPS, ALL_TO_FIRST))
        )
        assert int(all_[0].load_E[:4].sum()) == int(dropping[0].wanted_E[:4].sum()) == 2 * TOKENS
        assert int(dropping[0].dropped) == TOKENS, "a device takes as many choices as of equal shares"
        names = ("even", "all", "dropping")
        return {
            name: torch.tensor(used) for name, (_, used) in zip(names, (even, all_, dropping), strict=True)
        }

    first, second = together(Topology(expert=2), work)
    assert int(first["all"]) < planned(2 * TOKENS)
    assert int(first["all"]) > 1.5 * int(first["even"]), "the measure sees the difference"
    assert int(second["all"]) < int(second["even"])
    assert int(first["dropping"]) < planned(TOKENS)
