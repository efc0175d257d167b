"""Small pieces of SVG as strings: escaped text, numbers, scales, axis ticks. Colours are in the CSS."""

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


def text(x: float, y: float, content: str, *, css: str = "", anchor: str = "start", turn: float = 0) -> str:
    """Text at (x, y), turned by ``turn`` degrees around it."""
    place = f'transform="rotate({pixel(turn)} {pixel(x)} {pixel(y)})" ' if turn else ""
    return (
        f'<text x="{pixel(x)}" y="{pixel(y)}" {place}text-anchor="{anchor}" class="{css}">'
        f"{html.escape(content)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    ends = f'x1="{pixel(x1)}" y1="{pixel(y1)}" x2="{pixel(x2)}" y2="{pixel(y2)}"'
    return f'<line {ends} class="{css}"/>'


def rect(x: float, y: float, width: float, height: float, *, css: str = "", title: str = "") -> str:
    box = f'x="{pixel(x)}" y="{pixel(y)}" width="{pixel(width)}" height="{pixel(height)}"'
    style = f' class="{css}"' if css else ""
    return f"<rect {box}{style}><title>{html.escape(title)}</title></rect>"


def cross(x: float, y: float, title: str) -> str:
    """A small x that marks something bad."""
    start = f"M{pixel(x - 3)} {pixel(y - 3)}"
    return f'<path class="cross" d="{start}l6 6m0 -6l-6 6"><title>{html.escape(title)}</title></path>'


def picture(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    """Wrap ``parts`` into an ``<svg>`` that scales to its box; ``label`` is what a screen reader says."""
    size = f'width="{pixel(width)}" height="{pixel(height)}" viewBox="0 0 {pixel(width)} {pixel(height)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{html.escape(label)}">'
    return head + "".join(parts) + "</svg>"


def standalone(drawn: str, css: str) -> str:
    """A picture as a file of its own: with its style, on a ground that is dark where the reader's page is."""
    head, _, rest = drawn.partition(">")
    ground = '<rect width="100%" height="100%" style="fill: var(--card)"/>'
    font = "svg { font-family: system-ui, sans-serif }"
    return f"{head}><style>{css}{font}</style>{ground}{rest}\n"


def text_width(content: str, size: float = 11) -> float:
    """Width in pixels, by a rule of thumb that errs on the wide side; CJK characters are square."""
    return sum(size if ord(char) > 0x2E80 else size * 0.58 for char in content)
