"""How much a process grows where all tokens of two go to its experts: run by an interpreter of its own.

The heap of one that ran other tests has room that it never gave back, and what fits there is not seen.
``python overload.py`` prints bytes of both processes as JSON.

Legend: T tokens of a process.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

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


CASES = {"even": (CONFIG, EVEN), "all": (CONFIG, ALL_TO_FIRST), "dropping": (DROPS, ALL_TO_FIRST)}


def used(name: str) -> list[int]:
    """What a pass adds in each of two processes, which have computed nothing before."""
    config, bias = CASES[name]

    def work(mesh: Mesh) -> Mapping[str, Tensor]:
        report, grown = peak_of_a_pass(config, mesh, bias)
        assert name == "even" or int(report.wanted_E[:4].sum()) == 2 * TOKENS
        assert int(report.dropped) == (TOKENS if name == "dropping" else 0), "a device takes equal shares"
        return {"grown": torch.tensor(grown)}

    return [int(found["grown"]) for found in together(Topology(expert=2), work)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: used(name) for name in CASES}))
