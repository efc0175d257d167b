"""Small pieces of SVG: escaped text, numbers, scales and axis ticks. Everything returns strings; colours are CSS."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps data from [low, high] onto pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def spread(values: Iterable[float], *, zero: bool = False) -> tuple[float, float]:
    """Lowest and highest finite value, widened so that they differ; (0, 1) when there is none."""
    finite = [value for value in values if math.isfinite(value)]
    if zero:
        finite.append(0.0)
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if low == high:
        reach = abs(low) * 0.1 or 1.0
        return (low, high + reach) if zero else (low - reach, high + reach)
    return low, high


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most about ``most`` round numbers inside [low, high]: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def short(value: float) -> str:
    """Three significant digits with k, M, G, T: what fits an axis."""
    if not math.isfinite(value):
        return "n/a"
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def pixel(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def text(x: float, y: float, content: str, *, css: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{pixel(x)}" y="{pixel(y)}" text-anchor="{anchor}" class="{css}">'
        f"{html.escape(content)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{pixel(x1)}" y1="{pixel(y1)}" x2="{pixel(x2)}" y2="{pixel(y2)}" class="{html.escape(css)}"/>'


def rect(x: float, y: float, width: float, height: float, css: str, title: str = "") -> str:
    inside = f"<title>{html.escape(title)}</title>" if title else ""
    return (
        f'<rect x="{pixel(x)}" y="{pixel(y)}" width="{pixel(max(width, 0))}" height="{pixel(max(height, 0))}"'
        f' class="{html.escape(css)}">{inside}</rect>'
    )


def picture(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    """Wrap ``parts`` into an ``<svg>`` that scales to its box; ``label`` is read to those who do not see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {pixel(width)} {pixel(height)}" role="img"'
        f' aria-label="{html.escape(label)}">{"".join(parts)}</svg>'
    )


def text_width(content: str, size: float = 11) -> float:
    """Width in pixels, by a rule of thumb that errs on the wide side; CJK characters are square."""
    return sum(size if ord(char) > 0x2E80 else size * 0.58 for char in content)
