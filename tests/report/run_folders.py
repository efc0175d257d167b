"""Run folders made of numbers that are known in advance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from consilium.records.io import write_json
from consilium.records.loads import LoadFile
from consilium.records.metrics import METRICS_FILE, to_line
from consilium.records.run import (
    META_FILE,
    SUMMARY_FILE,
    BitsPerByte,
    Dense,
    Hardware,
    RunMeta,
    Sample,
    StepRecord,
    Summary,
    Versions,
)
from consilium.records.specialisation import (
    SPECIALISATION_FILE,
    Association,
    LayerSpecialisation,
    Specialisation,
)

DOMAINS = ("code", "prose")
SYNTAXES = ("keyword", "name", "operator")


@dataclass(frozen=True)
class Kind:
    steps: int = 20
    layers: int = 2
    experts: int = 4
    dead: tuple[int, ...] = ()
    """Experts that get nothing, in every layer."""
    ended: bool = True
    bias: float | None = None
    """What the selection bias spreads by in a step."""
    prompt: str = "def f(x):"
    model: str = "deepseek-v3:tiny"


MakeRun = Callable[[str, Kind], Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(name: str, kind: Kind) -> Path:
        run = tmp_path / name
        run.mkdir()
        write_json(run / META_FILE, meta(kind))
        (run / "config.yaml").write_text("steps: 20\n")
        lines = [to_line(step_record(step, kind)) for step in range(kind.steps + 1)]
        (run / METRICS_FILE).write_text("".join(lines))
        if kind.layers:
            write_loads(run, kind)
            write_json(run / SPECIALISATION_FILE, specialisation(kind))
        if kind.ended:
            write_json(run / SUMMARY_FILE, summary(kind))
            (run / "checkpoints" / f"step-{kind.steps}").mkdir(parents=True)
            (run / "checkpoints" / "step-9").mkdir(exist_ok=True)
        return run

    return make


def meta(kind: Kind) -> RunMeta:
    return RunMeta(
        model=kind.model,
        parameters_total=8_120_000,
        parameters_active=2_310_000,
        corpus="builtin",
        corpus_sha256="ab12" * 16,
        seed=0,
        started=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        versions=Versions(consilium="0.1.0", torch="2.13.0", python="3.11.9"),
        hardware=Hardware(cpu="a CPU", threads=2, memory_bytes=2**34),
    )


def bits(offset: float) -> BitsPerByte:
    return BitsPerByte(domains={"code": 1.5 + offset, "prose": 2.5 + offset})


def step_record(step: int, kind: Kind) -> StepRecord:
    fall = math.exp(-4 * step / kind.steps)
    measured = bits(4 * fall)
    return StepRecord(
        step=step,
        tokens=step * 100,
        ce=3 + 5 * fall,
        tok_per_sec=4800.0,
        router_entropy=3.0 - step / kind.steps,
        bias_spread=kind.bias and kind.bias * step,
        bits_per_byte=measured.macro if step % 5 == 0 else None,
        domains=measured.domains if step % 5 == 0 else {},
        layers=dict.fromkeys(range(1, kind.layers + 1), 1.25),
    )


def write_loads(run: Path, kind: Kind) -> None:
    file = LoadFile.create(run, layers=range(1, kind.layers + 1), experts=kind.experts)
    noise = np.random.default_rng(0)
    for step in range(1, kind.steps + 1):
        load_LE = noise.poisson(100, (kind.layers, kind.experts))
        load_LE[:, list(kind.dead)] = 0
        file.append(step, load_LE.tolist())


def association(experts: int, labels: int, bits_above_chance: float) -> Association:
    counts = tuple(
        tuple(10 + 30 * (expert % labels == label) for label in range(labels)) for expert in range(experts)
    )
    return Association(counts_EL=counts, bits=bits_above_chance + 0.01, shuffled_bits=0.01, shuffles=8)


def specialisation(kind: Kind, *, domain: float = 0.1, syntax: float = 0.3) -> Specialisation:
    layers = tuple(
        LayerSpecialisation(
            layer=layer,
            domain=association(kind.experts, len(DOMAINS), domain),
            syntax=association(kind.experts, len(SYNTAXES), syntax),
        )
        for layer in range(1, kind.layers + 1)
    )
    return Specialisation(domains=DOMAINS, syntaxes=SYNTAXES, tokens=1000, layers=layers)


def summary(kind: Kind) -> Summary:
    return Summary(
        steps=kind.steps,
        tokens=kind.steps * 100,
        seconds=12.0,
        tokens_per_second=4790.0,
        trained=bits(0.0),
        untrained=bits(4.0),
        trigram=bits(0.5),
        xz=bits(0.9),
        dense=Dense(bits_per_byte=bits(0.1), parameters=2_300_000, tokens_per_second=7000.0),
        sample=Sample(prompt=kind.prompt, text="\n    return x < 3 & 今天"),
    )
