"""The curves of a page, of one run or of two over each other; the second run is dashed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import numpy as np

from consilium.records.run import StepRecord
from consilium.report.lines import LineChart, Rule, Series
from consilium.report.load_map import LoadMap
from consilium.report.series import Point, points, smooth
from consilium.report.source import Run
from consilium.report.words import LIMIT
from consilium.words.say import say

MOST_LINES = 8
"""Layers drawn one by one; beyond it, the spread over layers is drawn."""


def loss_chart(runs: Sequence[Run]) -> LineChart:
    """Training loss: faint as measured, strong as an exponential mean."""
    series: list[Series] = []
    for number, run in enumerate(runs):
        raw = _of(run, lambda record: record.ce if record.ce is not None else record.loss)
        name = run.name if len(runs) > 1 else say("training loss, smoothed")
        series.append(Series("", raw, number, "faint"))
        series.append(Series(name, smooth(raw, len(raw) // 40), number, "line" if number == 0 else "dashed"))
    skipped = tuple(float(r.step) for run in runs for r in run.metrics.records if r.skipped)
    return LineChart(
        say("training loss"),
        say("step"),
        say("nats per token"),
        tuple(series),
        crosses=skipped,
        cross_label=say("skipped"),
    )


def bits_chart(runs: Sequence[Run]) -> LineChart:
    """Held-out bits per byte, domains thin; what needs no training and a dense model as lines to beat."""
    series: list[Series] = []
    for number, run in enumerate(runs):
        name = say("mean over domains") if len(runs) == 1 else say("{run}: mean", run=run.name)
        style = "line" if number == 0 else "dashed"
        series.append(Series(name, _of(run, lambda record: record.bits_per_byte), number, style))
    if len(runs) == 1:
        names = {name: None for record in runs[0].metrics.records for name in record.domains}
        for place, name in enumerate(names, start=1):
            series.append(Series(name, _domain(runs[0], name), place, "thin"))
    return LineChart(
        say("held-out bits per byte"),
        say("step"),
        say("bits per byte"),
        tuple(series),
        rules=_rivals(runs[0]),
    )


def entropy_chart(runs: Sequence[Run]) -> LineChart:
    """Entropy of the router's scores, from 0, decided, to that of a router that prefers nobody."""
    experts = {run.loads.experts for run in runs if run.loads is not None}
    rules = tuple(
        Rule(math.log(e), say("ln {e} = {most:.2f}: no preference", e=e, most=math.log(e)))
        for e in sorted(experts)
    )
    drawn = _measure(
        runs, say("router entropy"), say("nats, mean over tokens and layers"), lambda r: r.router_entropy
    )
    return replace(drawn, rules=rules, from_zero=True)


def dropped_chart(runs: Sequence[Run]) -> LineChart:
    """Copies that a capacity dropped, as a share of those that routers wanted."""
    return _measure(
        runs, say("dropped tokens"), say("percent of the copies wanted"), lambda r: _percent(r.dropped_frac)
    )


def bias_chart(runs: Sequence[Run]) -> LineChart:
    """How far the selection bias of the worst layer had to spread to balance it."""
    return _measure(
        runs, say("bias spread"), say("highest less lowest, worst layer"), lambda r: r.bias_spread
    )


def speed_chart(runs: Sequence[Run]) -> LineChart:
    return _measure(runs, say("training speed"), say("tokens/s"), lambda r: r.tok_per_sec)


def rate_chart(runs: Sequence[Run]) -> LineChart:
    return _measure(runs, say("learning rate"), "", lambda r: r.lr)


def norm_chart(runs: Sequence[Run]) -> LineChart:
    return _measure(runs, say("gradient norm"), say("before clipping"), lambda r: r.grad_norm)


def losses_chart(runs: Sequence[Run]) -> LineChart:
    """Balance losses and tokens further ahead, by name, coefficients included."""
    series = _by_name(runs, lambda record: record.losses)
    return LineChart(say("losses beside the next token"), say("step"), say("nats per token"), series)


def shares_chart(runs: Sequence[Run]) -> LineChart:
    """Shares of the domains, where they follow the losses."""
    series = _by_name(runs, lambda record: record.shares)
    return LineChart(say("share of the rows by domain"), say("step"), say("share of the rows"), series)


def _by_name(runs: Sequence[Run], values: Callable[[StepRecord], Mapping[str, float]]) -> tuple[Series, ...]:
    series: list[Series] = []
    for number, run in enumerate(runs):
        names = {name: None for record in run.metrics.records for name in values(record)}
        for place, name in enumerate(names):
            label = name if len(runs) == 1 else f"{run.name}: {name}"
            curve = points((r.step, values(r).get(name)) for r in run.metrics.records)
            series.append(Series(label, curve, place, "line" if number == 0 else "dashed"))
    return tuple(series)


def _measure(
    runs: Sequence[Run], title: str, unit: str, value: Callable[[StepRecord], float | None]
) -> LineChart:
    """One number of each logged step: alone it is called by its name, beside another by its run's."""
    series = tuple(
        Series(
            title if len(runs) == 1 else run.name,
            _of(run, value),
            number,
            "line" if number == 0 else "dashed",
        )
        for number, run in enumerate(runs)
    )
    return LineChart(title, say("step"), unit or title, series)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def balance_chart(runs: Sequence[Run]) -> LineChart:
    """max/mean load of each layer, smoothed, with the limit."""
    series: list[Series] = []
    for number, run in enumerate(runs):
        lines = _balance(run)
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        style = "line" if number == 0 else "dashed"
        series += [Series(prefix + name, curve, place, style) for place, (name, curve) in enumerate(lines)]
    rules = (Rule(LIMIT, say("limit {limit}", limit=LIMIT)), Rule(1.0, say("fair share")))
    return LineChart(
        say("busiest expert over fair share"),
        say("step"),
        say("max / mean load"),
        tuple(series),
        rules=rules,
    )


def _balance(run: Run) -> list[tuple[str, tuple[Point, ...]]]:
    """Named curves: of every layer, or over layers where there are many."""
    if run.loads is not None:
        curves = _from_loads(run, run.loads)
    else:
        layers = sorted({layer for record in run.metrics.records for layer in record.layers})
        curves = [(run.layer_name(i), _layer(run, i)) for i in layers]
    return [(name, smooth(curve, len(curve) // 40)) for name, curve in curves]


def _from_loads(run: Run, loads: LoadMap) -> list[tuple[str, tuple[Point, ...]]]:
    values_LS = loads.max_over_mean_LS
    names = [run.layer_name(layer) for layer in loads.layers]
    if len(names) > MOST_LINES:
        values_LS = np.quantile(values_LS, (1.0, 0.5, 0.0), axis=0)
        names = [say("least even layer"), say("median layer"), say("most even layer")]
    steps = loads.steps_S.tolist()
    return [
        (name, tuple(zip(steps, values_S.tolist(), strict=True)))
        for name, values_S in zip(names, values_LS, strict=True)
    ]


def _of(run: Run, value: Callable[[StepRecord], float | None]) -> tuple[Point, ...]:
    return points((record.step, value(record)) for record in run.metrics.records)


def _domain(run: Run, name: str) -> tuple[Point, ...]:
    return points((record.step, record.domains.get(name)) for record in run.metrics.records)


def _layer(run: Run, layer: int) -> tuple[Point, ...]:
    return points((record.step, record.layers.get(layer)) for record in run.metrics.records)


def _rivals(run: Run) -> tuple[Rule, ...]:
    if run.summary is None:
        return ()
    summary = run.summary
    found: Iterable[tuple[str, float | None]] = (
        (say("byte trigram"), summary.trigram and summary.trigram.macro),
        ("xz", summary.xz and summary.xz.macro),
        (say("dense"), summary.dense and summary.dense.bits_per_byte.macro),
    )
    return tuple(Rule(value, f"{name} {value:.3f}") for name, value in found if value is not None)


CHARTS: Final[Mapping[str, Callable[[Sequence[Run]], LineChart]]] = MappingProxyType(
    {
        "loss": loss_chart,
        "bits": bits_chart,
        "balance": balance_chart,
        "entropy": entropy_chart,
        "dropped": dropped_chart,
        "bias": bias_chart,
        "losses": losses_chart,
        "shares": shares_chart,
        "rate": rate_chart,
        "norm": norm_chart,
        "speed": speed_chart,
    }
)
"""All of them, by the names under which pages have them."""
