"""A run in pieces, for a page that is open already and asks again while the run goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from consilium.report import curves, tables, words
from consilium.report.build import shown, strips
from consilium.report.lines import LineChart, line_chart
from consilium.report.load_map import LoadMap
from consilium.report.rasters import colour_bar
from consilium.report.source import Run
from consilium.words.say import say

HOVER_CELLS: Final = 800
"""Of all loads together: fewer than in a page that is read once, because they travel again and again."""
_ALWAYS: Final = frozenset({"loss", "bits"})
"""Curves that are there before they have a point."""


def pieces(run: Run, beside: Run | None = None) -> dict[str, Any]:
    """Pictures as SVG, and sentences, as plain data; ``beside`` is a second run in the same curves."""
    runs = [run] if beside is None else [run, beside]
    loaded = [(one, one.loads) for one in runs if one.loads is not None]
    return {
        "state": _state(run),
        "tiles": [asdict(tile) for tile in tables.tiles(run)],
        "alarms": [text for one in runs for text in _alarms(one)],
        "balance": [_named(one, runs, words.balance(one, loads)) for one, loads in loaded],
        "charts": _charts(runs),
        "loads_title": say("Who does the work"),
        "loads_key": colour_bar(say("load over fair share")),
        "loads": [_loads(one, loads, runs) for one, loads in loaded],
        "samples_title": say("What it writes"),
        "samples": [_sample(one) for one in runs if one.summary is not None and one.summary.sample],
    }


def _state(run: Run) -> str:
    if run.summary is not None:
        return say("finished")
    step = run.metrics.records[-1].step if run.metrics.records else 0
    return say("not finished, at step {step:,}", step=step)


def _named(run: Run, runs: Sequence[Run], sentence: str) -> str:
    return sentence if len(runs) == 1 else f"{run.name}: {sentence}"


def _alarms(run: Run) -> list[str]:
    """What somebody who watches has to hear, in sentences."""
    found = [words.spikes(run), words.diverged(run), words.dropping(run)]
    if run.metrics.torn is not None and run.summary is not None:
        found.append(
            say(
                "The last line of {run}/metrics.jsonl was cut short by a crash and is left out; --resume"
                " repairs it.",
                run=run.name,
            )
        )
    return [text for text in found if text is not None]


def _charts(runs: Sequence[Run]) -> list[dict[str, str]]:
    drawn = ((name, chart(runs)) for name, chart in curves.CHARTS.items())
    return [
        {"title": chart.title, "svg": line_chart(chart)}
        for name, chart in drawn
        if name in _ALWAYS or _has_points(chart)
    ]


def _has_points(chart: LineChart) -> bool:
    return any(math.isfinite(y) for series in chart.series for _, y in series.points)


def _loads(run: Run, loads: LoadMap, runs: Sequence[Run]) -> dict[str, Any]:
    name = run.name if len(runs) > 1 else ""
    cells = HOVER_CELLS // len(runs)
    return {"run": name, "pictures": strips(run, loads, len(runs), hover_cells=cells)}


def _sample(run: Run) -> dict[str, str]:
    assert run.summary is not None, "asked for the sample of a run that has not ended"
    sample = run.summary.sample
    assert sample is not None, "asked for the sample of a run that has none"
    return {"run": run.name, "prompt": sample.prompt, "text": shown(sample.text)}
