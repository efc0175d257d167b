"""Heat maps as SVG strings: a small PNG drawn large for the colours, clear rectangles over it for the hover values.

Legend: C columns of the picture, L labels (layers where said), E experts.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from consilium.report.colours import LEVELS, MISSING, NEVER, OCTAVES, PALETTE, indices
from consilium.report.load_map import Floats, LoadMap
from consilium.report.png import data_uri, indexed_png
from consilium.report.svg import Scale, line, picture, pixel, rect, short, text, ticks

LEFT, RIGHT, BOTTOM, TOP = 46.0, 22.0, 34.0, 22.0
HOVER_CELLS = 4000
"""Most hover rectangles of all heat maps of one kind together; beyond it cells share one."""


def load_strip(loads: LoadMap, row: int, *, width: float = 1088, hover_cells: int = 1000) -> str:
    """Load of every expert of one MoE layer (the ``row``-th) over the steps, as a ratio to its fair share."""
    share_EC, experts = loads.share_LEC[row], loads.experts
    height = experts * min(max(160 / experts, 1.0), 12.0)
    plot = (LEFT, TOP, width - LEFT - RIGHT, height)
    title = f"layer {loads.layers[row]}: load of each expert over steps"
    parts = [_image(indices(share_EC), plot), *_strip_hover(loads, row, plot, hover_cells)]
    parts += [_dead(loads, row, expert, plot) for expert in np.flatnonzero(loads.dead_LE[row]).tolist()]
    parts += _strip_axes(loads, plot)
    parts.append(text(LEFT, 14, f"layer {loads.layers[row]}", css="strong"))
    balance = f"last steps: busiest expert at {loads.final_L[row]:.2f} × fair share"
    parts.append(text(width - RIGHT, 14, balance, css="axis", anchor="end"))
    return picture(width, TOP + height + BOTTOM, title, parts)


def lift(counts_EL: Sequence[Sequence[int]]) -> Floats:
    """How much more often each expert is chosen for a label than for all tokens: p(e | l) / p(e), NaN where unused."""
    counts = np.asarray(counts_EL, dtype=np.float64)
    expert_E1, label_1L = counts.sum(axis=1, keepdims=True), counts.sum(axis=0, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts * counts.sum() / (expert_E1 * label_1L)


def affinity(
    title: str, labels: Sequence[str], counts_EL: Sequence[Sequence[int]], *, hover: bool = True
) -> str:
    """Expert x label as lift, experts grouped by the label they prefer most."""
    lift_EL = lift(counts_EL)
    order = preferred_order(lift_EL)
    experts, columns = lift_EL.shape
    cell_width, height = max(min(300 / columns, 52.0), 14.0), experts * min(max(224 / experts, 1.0), 16.0)
    plot = (LEFT, TOP, columns * cell_width, height)
    parts = [text(LEFT, 14, title, css="strong"), _image(indices(lift_EL[order]), plot)]
    if hover:
        parts += _affinity_hover(labels, counts_EL, lift_EL, order, plot)
    parts += [
        _label(name, LEFT + (place + 0.5) * cell_width, TOP + height) for place, name in enumerate(labels)
    ]
    parts.append(_turned("experts", 14, TOP + height / 2))
    return picture(LEFT + columns * cell_width + RIGHT, TOP + height + 76, title, parts)


def preferred_order(lift_EL: Floats) -> list[int]:
    """Experts by the label they prefer, the strongest preference first; unused experts last."""
    known = np.nan_to_num(lift_EL, nan=-1.0)
    best_E, strength_E = known.argmax(axis=1), known.max(axis=1)
    label_E = np.where(strength_E < 0, lift_EL.shape[1], best_E)
    return np.lexsort((-strength_E, label_E)).tolist()


def colour_bar(meaning: str, *, width: float = 420) -> str:
    """The legend of every heat map on the page."""
    levels = np.arange(LEVELS, dtype=np.uint8)[None, :]
    bar = (8.0, 4.0, 240.0, 12.0)
    parts = [_image(levels, bar), _image(np.full((1, 1), NEVER, np.uint8), (300.0, 4.0, 12.0, 12.0))]
    scale = Scale(-OCTAVES, OCTAVES, bar[0], bar[0] + bar[2])
    for octave, name in ((-2, "≤ ¼ ×"), (-1, "½"), (0, "1.00"), (1, "2"), (2, "≥ 4 ×")):
        parts.append(
            text(
                scale(octave),
                30,
                name,
                css="axis",
                anchor="middle" if abs(octave) < 2 else ("start" if octave < 0 else "end"),
            )
        )
    parts.append(text(318, 14, "no token", css="axis"))
    return picture(width, 34, f"colours: {meaning}", parts)


Plot = tuple[float, float, float, float]
"""x, y, width, height."""


def _image(pixels_HW: NDArray[np.uint8], plot: Plot) -> str:
    x, y, width, height = (pixel(value) for value in plot)
    source = data_uri(indexed_png(pixels_HW, PALETTE, transparent=MISSING))
    return (
        f'<image href="{source}" x="{x}" y="{y}" width="{width}" height="{height}"'
        f' preserveAspectRatio="none" class="heat"/>'
    )


def _grid(plot: Plot, rows: int, columns: int, title: Callable[[int, int], str]) -> list[str]:
    x, y, width, height = plot
    cell_width, cell_height = width / columns, height / rows
    return [
        rect(
            x + column * cell_width,
            y + row * cell_height,
            cell_width,
            cell_height,
            "cell",
            title(row, column),
        )
        for row in range(rows)
        for column in range(columns)
    ]


def _strip_hover(loads: LoadMap, row: int, plot: Plot, cells: int) -> list[str]:
    share_EC = loads.share_LEC[row]
    experts, columns = share_EC.shape
    if cells < experts:
        return []
    groups = min(cells // experts, columns, 24)
    edges = np.linspace(0, columns, groups + 1).astype(int).tolist()

    def title(expert: int, group: int) -> str:
        part_C = share_EC[expert, edges[group] : edges[group + 1]]
        known_C = part_C[~np.isnan(part_C)]
        mean = f"{known_C.mean():.2f} × fair share" if known_C.size else "nothing routed"
        return f"expert {expert}, from step {loads.first_C[edges[group]]:,}: {mean}"

    return _grid(plot, experts, groups, title)


def _dead(loads: LoadMap, row: int, expert: int, plot: Plot) -> str:
    x, y, width, height = plot
    middle = y + (expert + 0.5) * height / loads.experts
    title = html.escape(
        f"expert {expert} of layer {loads.layers[row]} is dead: no token at the end of the run"
    )
    return f'<path class="cross" d="M{pixel(x + width + 5)} {pixel(middle - 3)}l6 6m0 -6l-6 6"><title>{title}</title></path>'


def _strip_axes(loads: LoadMap, plot: Plot) -> list[str]:
    x, y, width, height = plot
    bottom = y + height
    low, high = float(loads.steps_S[0]), float(loads.steps_S[-1])
    scale = Scale(low, high if high > low else low + 1, x, x + width)
    parts = [_turned("expert", 12, y + height / 2)]
    for expert in (0, loads.experts - 1):
        parts.append(
            text(
                x - 6, y + (expert + 0.5) * height / loads.experts + 4, str(expert), css="axis", anchor="end"
            )
        )
    for step in ticks(scale.low, scale.high, 8):
        parts.append(line(scale(step), bottom, scale(step), bottom + 4, "tick"))
        parts.append(text(scale(step), bottom + 16, short(step), css="axis", anchor="middle"))
    parts.append(text(x + width, bottom + 30, "step", css="axis", anchor="end"))
    return parts


def _affinity_hover(
    labels: Sequence[str],
    counts_EL: Sequence[Sequence[int]],
    lift_EL: Floats,
    order: Sequence[int],
    plot: Plot,
) -> list[str]:
    def title(row: int, column: int) -> str:
        expert = order[row]
        ratio, copies = lift_EL[expert, column], counts_EL[expert][column]
        share = copies / max(sum(counts_EL[expert]), 1)
        times = "never used" if np.isnan(ratio) else f"{ratio:.2f} × its usual share"
        return f"expert {expert}, {labels[column]}: {times}; {share:.0%} of its tokens ({copies:,})"

    return _grid(plot, len(order), len(labels), title)


def _label(name: str, x: float, y: float) -> str:
    place = f"translate({pixel(x + 4)} {pixel(y + 12)}) rotate(-40)"
    return f'<text transform="{place}" text-anchor="end" class="axis">{html.escape(name)}</text>'


def _turned(name: str, x: float, y: float) -> str:
    place = f"translate({pixel(x)} {pixel(y)}) rotate(-90)"
    return f'<text transform="{place}" text-anchor="middle" class="axis">{html.escape(name)}</text>'
