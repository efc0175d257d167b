"""Horizontal bars as SVG strings: shorter is better, one of them is ours."""

from __future__ import annotations

import math
from dataclasses import dataclass

from consilium.report.svg import Scale, picture, rect, text, text_width
from consilium.words.say import say

ROW = 30.0
BAR = 18.0


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    value: float
    css: str = "bar"
    """``bar`` or ``bar ours``."""


def bar_chart(
    title: str, unit: str, bars: tuple[Bar, ...], *, width: float = 540, shown_as: str = "{:.3f}"
) -> str:
    """One row a bar with its value at the end; a value that is not finite says so and has no bar."""
    left = max((text_width(bar.label) for bar in bars), default=0.0) + 14
    high = max((bar.value for bar in bars if math.isfinite(bar.value)), default=1.0)
    scale = Scale(0, high if high > 0 else 1.0, left, width - 60)
    parts: list[str] = []
    for row, bar in enumerate(bars):
        y = row * ROW + 4
        finite = math.isfinite(bar.value)
        end = scale(max(bar.value, 0.0)) if finite else left
        shown = shown_as.format(bar.value) if finite else say("n/a")
        parts += [
            text(left - 8, y + BAR - 5, bar.label, css="legend", anchor="end"),
            rect(left, y, end - left, BAR, css=bar.css, title=f"{bar.label}: {shown} {unit}"),
            text(end + 6, y + BAR - 5, shown, css="value"),
        ]
    return picture(width, len(bars) * ROW + 4, title, parts)
