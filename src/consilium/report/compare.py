"""Runs beside each other: the figures of each as data and as cells, and a page of them all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from consilium.errors import ConsiliumError
from consilium.records.metrics import METRICS_FILE
from consilium.records.run import CONFIG_FILE, StepRecord
from consilium.report import curves
from consilium.report.build import PAGES, save
from consilium.report.lines import line_chart
from consilium.report.plain import counted
from consilium.report.source import Run, read_run
from consilium.words.say import language, say

COMPARISON_FILE: Final = "comparison.html"


def headings() -> tuple[str, ...]:
    """Of the columns of ``cells``."""
    return (
        say("run"),
        say("model"),
        say("parameters"),
        say("steps"),
        say("tokens"),
        say("bits per byte"),
        say("tokens/s"),
        say("max/mean"),
        say("dead experts"),
        say("state"),
    )


def is_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).exists() or (folder / METRICS_FILE).exists()


def runs_in(folder: Path, depth: int = 100) -> Iterator[Path]:
    """Run folders in ``folder`` and its subfolders, by name; nothing inside a run is one."""
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()):
        if is_run(inner):
            yield inner
        elif not inner.name.startswith(".") and depth > 1:
            yield from runs_in(inner, depth - 1)


def figures(run: Run) -> dict[str, object]:
    """What a run came to so far; None is not known, or not yet."""
    records, summary, meta, loads = run.metrics.records, run.summary, run.meta, run.loads
    bits = summary.trained.macro if summary else _newest(records, "bits_per_byte")
    return {
        "run": str(run.folder),
        "model": meta.model if meta else None,
        "parameters": meta.parameters_total if meta else None,
        "steps": summary.steps if summary else _newest(records, "step"),
        "tokens": summary.tokens if summary else _newest(records, "tokens"),
        "bits_per_byte": None if bits is None else _known(bits),
        "tokens_per_second": summary.tokens_per_second if summary else _newest(records, "tok_per_sec"),
        "max_over_mean": None if loads is None else _known(loads.final[loads.worst].ratio),
        "dead_experts": None if loads is None else loads.dead,
        "finished": summary is not None,
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def cells(found: dict[str, object]) -> tuple[str, ...]:
    """The figures below ``headings()``."""
    formats = ("{}", "{}", "", "{:,.0f}", "", "{:.3f}", "{:,.0f}", "{:.2f}", "{:.0f}")
    *values, finished = found.values()
    shown = [_cell(value, pattern) for value, pattern in zip(values, formats, strict=True)]
    return *shown, say("finished") if finished else say("not finished")


def build_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write a page with the figures and curves of ``folders`` to ``out`` and return its path.

    Raises ConsiliumError when one is not a run, or when a record is damaged.
    """
    runs = [read_run(folder) for folder in folders]
    drawn = (curves.loss_chart, curves.bits_chart, curves.balance_chart, curves.entropy_chart)
    page = PAGES.get_template("comparison.html.j2").render(
        say=say,
        language=language(),
        headings=headings(),
        rows=[cells(figures(run)) for run in runs],
        charts=[line_chart(chart(runs)) for chart in drawn],
    )
    return save(out, page)


def read_or_refusal(folder: Path) -> Run | str:
    """The run, or why it cannot be read: one damaged run must not hide the others."""
    try:
        return read_run(folder)
    except ConsiliumError as error:
        return str(error)


def _newest(records: Sequence[StepRecord], name: str) -> float | None:
    found = (getattr(record, name) for record in reversed(records))
    return next((value for value in found if value is not None), None)


def _cell(value: object, pattern: str) -> str:
    if value is None:
        return "-"
    return pattern.format(value) if pattern else counted(int(str(value)))
