"""Line charts as SVG strings: axes with units, reference lines, hover values, gaps for NaN."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from consilium.report.series import Point, thin
from consilium.report.svg import Scale, cross, line, picture, pixel, short, spread, text, text_width, ticks
from consilium.words.say import say

LEFT, RIGHT, BOTTOM = 56.0, 12.0, 34.0
LEGEND_ROW = 16.0
RULE_ROW = 12.0
HOVER_POINTS = 80
MOST_CROSSES = 200
COLOURS = 8


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    points: tuple[Point, ...]
    colour: int
    """Index into the page's palette, modulo its size."""
    style: Literal["line", "thin", "faint", "dashed"] = "line"
    """``faint`` is the raw data under a smoothed line: no legend, no hover."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A horizontal line to compare with."""

    y: float
    label: str


@dataclass(frozen=True, slots=True)
class LineChart:
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    rules: tuple[Rule, ...] = ()
    crosses: tuple[float, ...] = ()
    """x of events, marked on the axis."""
    cross_label: str = ""
    from_zero: bool = False
    width: float = 540
    height: float = 280


def line_chart(chart: LineChart) -> str:
    """Draw ``chart``; without any finite value it says so in the place of curves."""
    shown = tuple(series for series in chart.series if any(math.isfinite(y) for _, y in series.points))
    legend, top = _legend(shown, chart.width)
    if not shown:
        middle = text(chart.width / 2, chart.height / 2, say("no data yet"), css="axis", anchor="middle")
        return picture(chart.width, chart.height, chart.title, [middle])
    x_scale, y_scale = _scales(chart, shown, top)
    parts = [*legend, *_axes(chart, x_scale, y_scale)]
    parts += [_path(series, x_scale, y_scale) for series in shown]
    parts += _rules(chart, x_scale, y_scale)
    parts += [_hover(series, chart, x_scale, y_scale) for series in shown if series.style != "faint"]
    for x, _ in thin([(x, 0.0) for x in chart.crosses], MOST_CROSSES):
        parts.append(cross(x_scale(x), y_scale.start, f"{chart.cross_label}, {chart.x_label} {x:,.0f}"))
    return picture(chart.width, chart.height, chart.title, parts)


def _scales(chart: LineChart, shown: Sequence[Series], top: float) -> tuple[Scale, Scale]:
    x_low, x_high = spread(x for series in shown for x, _ in series.points)
    values = [y for series in shown for _, y in series.points] + [rule.y for rule in chart.rules]
    low, high = spread(values, zero=chart.from_zero)
    margin = (high - low) * 0.05
    low = max(low - margin, 0.0) if low >= 0 else low - margin
    return (
        Scale(x_low, x_high, LEFT, chart.width - RIGHT),
        Scale(low, high + margin, chart.height - BOTTOM, top),
    )


def _axes(chart: LineChart, x_scale: Scale, y_scale: Scale) -> list[str]:
    parts: list[str] = []
    for value in ticks(y_scale.low, y_scale.high):
        y = y_scale(value)
        parts += [
            line(x_scale.start, y, x_scale.end, y, "grid"),
            text(x_scale.start - 6, y + 4, short(value), css="axis", anchor="end"),
        ]
    for value in ticks(x_scale.low, x_scale.high, 6):
        x = x_scale(value)
        parts += [
            line(x, y_scale.start, x, y_scale.start + 4, "tick"),
            text(x, y_scale.start + 16, short(value), css="axis", anchor="middle"),
        ]
    parts.append(line(x_scale.start, y_scale.start, x_scale.end, y_scale.start, "tick"))
    parts.append(text(x_scale.end, chart.height - 4, chart.x_label, css="axis", anchor="end"))
    middle = (y_scale.start + y_scale.end) / 2
    parts.append(text(12, middle, chart.y_label, css="axis", anchor="middle", turn=-90))
    return parts


def _legend(shown: Sequence[Series], width: float) -> tuple[list[str], float]:
    """The legend's parts and the y where the plot may start; names wrap into rows."""
    parts: list[str] = []
    x, y = LEFT, 12.0
    for series in shown:
        if series.style == "faint" or not series.name:
            continue
        needed = 24 + text_width(series.name) + 12
        if x + needed > width and x > LEFT:
            x, y = LEFT, y + LEGEND_ROW
        parts.append(line(x, y - 4, x + 18, y - 4, f"{series.style} c{series.colour % COLOURS}"))
        parts.append(text(x + 24, y, series.name, css="legend"))
        x += needed
    return parts, y + 12


def _rules(chart: LineChart, x_scale: Scale, y_scale: Scale) -> list[str]:
    """Lowest first; a label that would touch the one below moves up."""
    parts: list[str] = []
    ceiling = math.inf
    for rule in sorted((rule for rule in chart.rules if math.isfinite(rule.y)), key=lambda rule: rule.y):
        y = y_scale(rule.y)
        ceiling = min(y - 4, ceiling - RULE_ROW)
        parts.append(line(x_scale.start, y, x_scale.end, y, "rule"))
        parts.append(text(x_scale.end, ceiling, rule.label, css="rule-label", anchor="end"))
    return parts


def _path(series: Series, x_scale: Scale, y_scale: Scale) -> str:
    commands: list[str] = []
    gap = True
    for x, y in thin(series.points):
        if math.isfinite(y):
            commands.append(f"{'M' if gap else 'L'}{pixel(x_scale(x))} {pixel(y_scale(y))}")
        gap = not math.isfinite(y)
    # A lone point has no length; a round cap on a zero-length segment draws a dot.
    closed = [
        here + "h0" if here[0] == after[0] == "M" else here
        for here, after in zip_longest(commands, commands[1:], fillvalue="M")
    ]
    return f'<path d="{"".join(closed)}" class="{series.style} c{series.colour % COLOURS}"/>'


def _hover(series: Series, chart: LineChart, x_scale: Scale, y_scale: Scale) -> str:
    finite = [point for point in series.points if math.isfinite(point[1])]
    stride = -(-len(finite) // HOVER_POINTS)
    dots: list[str] = []
    for x, y in [*finite[: -1 : max(stride, 1)], finite[-1]]:
        title = html.escape(
            f"{series.name or chart.title}, {chart.x_label} {x:,.0f}: {y:.4g} {chart.y_label}"
        )
        dots.append(
            f'<circle cx="{pixel(x_scale(x))}" cy="{pixel(y_scale(y))}" r="5"><title>{title}</title></circle>'
        )
    return f'<g class="hit c{series.colour % COLOURS}">{"".join(dots)}</g>'
