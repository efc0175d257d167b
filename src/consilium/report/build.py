"""A run folder in, one self-contained page out: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from consilium.records.io import write_text
from consilium.report import curves, tables, words
from consilium.report.bars import Bar, bar_chart
from consilium.report.lines import line_chart
from consilium.report.load_map import LoadMap
from consilium.report.rasters import HOVER_CELLS, affinity, colour_bar, load_strip
from consilium.report.source import Run, read_run
from consilium.words.say import language, say

REPORT_FILE = "report.html"
MOST_STRIPS = 16
"""Layers whose load is drawn; of more, evenly spaced ones."""
MOST_AFFINITIES = 6

PAGES = Environment(
    loader=PackageLoader("consilium.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def build_report(run: Path, beside: Path | None = None) -> Path:
    """Write ``run/report.html`` from the records of the run and return its path.

    ``beside`` is a second run, such as one without balancing: curves lie over, heat maps stand beside.
    Works while the run goes on. Raises ConsiliumError when a folder is not a run or a record is damaged.
    """
    page = render(read_run(run), None if beside is None else read_run(beside))
    return save(run / REPORT_FILE, page)


def save(path: Path, page: str) -> Path:
    """Write a page whole or not at all."""
    write_text(path, page)
    return path


def render(run: Run, beside: Run | None = None) -> str:
    """Return the page. Its template trusts the pictures, which escape their own text, and nothing else."""
    runs = [run] if beside is None else [run, beside]
    bars = tables.bars(run, beside)
    return PAGES.get_template("report.html.j2").render(
        say=say,
        words=words,
        language=language(),
        run=run,
        runs=runs,
        facts=[] if run.meta is None else tables.facts(run.meta),
        tiles=tables.tiles(run),
        bars=_bars(bars),
        scores=tables.scores(run, beside),
        charts=_charts(runs),
        strips=[(other, strips(other, other.loads, len(runs))) for other in runs if other.loads is not None],
        balance=[(other, words.balance(other, other.loads)) for other in runs if other.loads is not None],
        affinities=[(other, _affinities(other)) for other in runs if other.specialisation is not None],
        specialisation=[
            (r, words.specialisation(r.specialisation)) for r in runs if r.specialisation is not None
        ],
        specialists=_specialists(run),
        load_bar=colour_bar(say("load over fair share")),
        affinity_bar=colour_bar(say("how much more often an expert is chosen for a label than usual")),
        dropped=any(record.dropped_frac for other in runs for record in other.metrics.records),
        bias=any(record.bias_spread is not None for other in runs for record in other.metrics.records),
        shares=any(record.shares for other in runs for record in other.metrics.records),
        losses=any(record.losses for other in runs for record in other.metrics.records),
        sample=None if run.summary is None or run.summary.sample is None else run.summary.sample,
        shown=shown,
        commands=tables.commands(run),
        hidden_layers=_hidden(run.loads),
    )


def _bars(found: tuple[Bar, ...]) -> str | None:
    if not found:
        return None
    return bar_chart(say("held-out bits per byte, lower is better"), say("bits per byte"), found)


def _charts(runs: list[Run]) -> dict[str, str]:
    return {name: line_chart(chart(runs)) for name, chart in curves.CHARTS.items()}


def shown(text: str) -> str:
    """A sample as a page shows it: a long run of empty lines is said, not drawn."""
    return re.sub(r"\n{4,}", lambda found: f"\n{_gap(len(found[0]) - 1)}\n", text)


def _gap(lines: int) -> str:
    return say("\u2026 {lines} empty lines \u2026", lines=lines)


def spaced(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` indices, evenly spaced, first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def strips(run: Run, loads: LoadMap, columns: int, hover_cells: int = HOVER_CELLS) -> list[str]:
    """The loads of a run, a picture a layer, ``columns`` runs beside each other."""
    rows = spaced(len(loads.layers), MOST_STRIPS)
    width, cells = 1088 / columns - 10 * (columns - 1), hover_cells // (columns * len(rows))
    names = [run.layer_name(loads.layers[row]) for row in rows]
    pairs = zip(rows, names, strict=True)
    return [load_strip(loads, row, name, width=width, hover_cells=cells) for row, name in pairs]


def _hidden(loads: LoadMap | None) -> int:
    return 0 if loads is None else max(len(loads.layers) - MOST_STRIPS, 0)


def _affinities(run: Run) -> list[tuple[int, str, str]]:
    record = run.specialisation
    assert record is not None, "asked for the specialisation of a run that has none"
    rows = [record.layers[row] for row in spaced(len(record.layers), MOST_AFFINITIES)]
    cells = sum(len(row.domain.counts_EL) for row in rows) * (len(record.domains) + len(record.syntaxes))
    hover = cells <= HOVER_CELLS
    return [
        (
            row.layer,
            affinity(
                say("{layer}: domain", layer=run.layer_name(row.layer)),
                record.domains,
                row.domain.counts_EL,
                hover=hover,
            ),
            affinity(
                say("{layer}: syntax", layer=run.layer_name(row.layer)),
                record.syntaxes,
                row.syntax.counts_EL,
                hover=hover,
            ),
        )
        for row in rows
    ]


def _specialists(run: Run) -> list[tuple[str, list[tables.Specialist]]]:
    if run.specialisation is None:
        return []
    return [
        (say("domain"), tables.specialists(run.specialisation, "domain")),
        (say("syntax"), tables.specialists(run.specialisation, "syntax")),
    ]
