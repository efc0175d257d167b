"""Heat maps as SVG strings: a small PNG drawn large for the colours, clear rectangles for the hover values.

Legend: C columns of the picture, L labels (layers where said), E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from consilium.report.colours import LEVELS, MISSING, NEVER, OCTAVES, PALETTE, indices
from consilium.report.load_map import Floats, LoadMap
from consilium.report.png import data_uri, indexed_png
from consilium.report.svg import Scale, cross, line, picture, pixel, rect, short, text, ticks
from consilium.words.say import say

LEFT, RIGHT, BOTTOM, TOP = 46.0, 22.0, 22.0, 22.0
SIDE = 36.0
LABEL = 11.0
"""Height of a number beside a row."""
MOST_NUMBERED = 64
"""Experts whose numbers stand beside an affinity, which is not in their order."""
HOVER_CELLS = 2400
"""Most hover rectangles of all heat maps of one kind together; beyond it cells share one."""


def load_strip(loads: LoadMap, row: int, name: str, *, width: float = 1088, hover_cells: int = 1000) -> str:
    """Load of every expert of one MoE layer (the ``row``-th) over the steps, as a ratio to its fair share."""
    share_EC, experts = loads.share_LEC[row], loads.experts
    height = experts * min(max(160 / experts, 1.0), 12.0)
    plot = (LEFT, TOP, width - LEFT - RIGHT, height)
    title = say("{layer}: load of each expert over steps", layer=name)
    parts = [_image(indices(share_EC), plot), _strip_hover(loads, row, plot, hover_cells)]
    parts += [_dead(loads, row, expert, plot) for expert in loads.final[row].dead]
    parts += _strip_axes(loads, plot)
    parts.append(text(LEFT, 14, name, css="strong"))
    balance = say("last steps: busiest expert at {ratio:.2f} × fair share", ratio=loads.final[row].ratio)
    parts.append(text(width - RIGHT, 14, balance, css="axis", anchor="end"))
    return picture(width, TOP + height + BOTTOM, title, parts)


def lift(counts_EL: Sequence[Sequence[int]]) -> Floats:
    """How much more often a label chooses an expert than all tokens do: p(e | l) / p(e), NaN where unused."""
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
    row = min(max(224 / experts, LABEL if experts <= MOST_NUMBERED else 1.0), 16.0)
    cell_width, height = max(200 / columns, 14.0), experts * row
    plot = (SIDE, TOP, columns * cell_width, height)
    parts = [text(SIDE, 14, title, css="strong"), _image(indices(lift_EL[order]), plot)]
    if hover:
        parts.append(_affinity_hover(labels, counts_EL, lift_EL, order, plot))
    parts += [
        text(SIDE + (place + 0.6) * cell_width, TOP + height + 12, name, css="axis", anchor="end", turn=-40)
        for place, name in enumerate(labels)
    ]
    if experts <= MOST_NUMBERED:
        parts += [
            text(SIDE - 4, TOP + (place + 0.5) * row + 4, str(expert), css="axis", anchor="end")
            for place, expert in enumerate(order)
        ]
    parts.append(text(8, TOP + height / 2, say("expert"), css="axis", anchor="middle", turn=-90))
    return picture(SIDE + columns * cell_width + 14, TOP + height + 76, title, parts)


def preferred_order(lift_EL: Floats) -> list[int]:
    """Experts by the label they prefer, the strongest preference first; unused experts last."""
    known = np.nan_to_num(lift_EL, nan=-1.0)
    best_E, strength_E = known.argmax(axis=1), known.max(axis=1)

    def rank(expert: int) -> tuple[int, float]:
        strength = float(strength_E[expert])
        return (lift_EL.shape[1] if strength < 0 else int(best_E[expert]), -strength)

    return sorted(range(lift_EL.shape[0]), key=rank)


def colour_bar(meaning: str, *, width: float = 420) -> str:
    """The legend of every heat map on the page."""
    levels = np.arange(LEVELS, dtype=np.uint8)[None, :]
    bar = (8.0, 4.0, 240.0, 12.0)
    parts = [_image(levels, bar), _image(np.full((1, 1), NEVER, np.uint8), (300.0, 4.0, 12.0, 12.0))]
    scale = Scale(-OCTAVES, OCTAVES, bar[0], bar[0] + bar[2])
    ends = (
        (-2, "≤ ¼ ×", "start"),
        (-1, "½", "middle"),
        (0, "1.00", "middle"),
        (1, "2", "middle"),
        (2, "≥ 4 ×", "end"),
    )
    parts += [text(scale(octave), 30, name, css="axis", anchor=anchor) for octave, name, anchor in ends]
    parts.append(text(318, 14, say("no token"), css="axis"))
    return picture(width, 34, say("colours: {meaning}", meaning=meaning), parts)


Plot = tuple[float, float, float, float]
"""x, y, width, height."""


def _image(pixels_HW: NDArray[np.uint8], plot: Plot) -> str:
    x, y, width, height = (pixel(value) for value in plot)
    source = data_uri(indexed_png(pixels_HW, PALETTE, transparent=MISSING))
    return (
        f'<image href="{source}" x="{x}" y="{y}" width="{width}" height="{height}"'
        f' preserveAspectRatio="none" class="heat"/>'
    )


def _grid(plot: Plot, rows: int, columns: int, title: Callable[[int, int], str]) -> str:
    x, y, width, height = plot
    cell_width, cell_height = width / columns, height / rows
    cells = [
        rect(
            x + column * cell_width, y + row * cell_height, cell_width, cell_height, title=title(row, column)
        )
        for row in range(rows)
        for column in range(columns)
    ]
    return f'<g class="cells">{"".join(cells)}</g>'


def _strip_hover(loads: LoadMap, row: int, plot: Plot, cells: int) -> str:
    share_EC = loads.share_LEC[row]
    experts, columns = share_EC.shape
    if cells < experts:
        return ""
    groups = min(cells // experts, columns, 24)
    edges = [group * columns // groups for group in range(groups + 1)]

    def title(expert: int, group: int) -> str:
        part_C = share_EC[expert, edges[group] : edges[group + 1]]
        known_C = part_C[~np.isnan(part_C)]
        where = say("expert {expert}, from step {step:,}", expert=expert, step=loads.first_C[edges[group]])
        if not known_C.size:
            return say("{where}: nothing routed", where=where)
        return say("{where}: {ratio:.2f} × fair share", where=where, ratio=known_C.mean())

    return _grid(plot, experts, groups, title)


def _dead(loads: LoadMap, row: int, expert: int, plot: Plot) -> str:
    x, y, width, height = plot
    middle = y + (expert + 0.5) * height / loads.experts
    title = say(
        "expert {expert} of layer {layer} is dead: no token at the end of the run",
        expert=expert,
        layer=loads.layers[row],
    )
    return cross(x + width + 8, middle, title)


def _strip_axes(loads: LoadMap, plot: Plot) -> list[str]:
    x, y, width, height = plot
    bottom = y + height
    low, high = float(loads.steps_S[0]), float(loads.steps_S[-1])
    scale = Scale(low, high if high > low else low + 1, x, x + width)
    parts = [text(14, y + height / 2, say("expert"), css="axis", anchor="middle", turn=-90)]
    row = height / loads.experts
    parts += [
        text(x - 6, y + (expert + 0.5) * row + 4, str(expert), css="axis", anchor="end")
        for expert in _numbered(loads.experts, row)
    ]
    for step in ticks(scale.low, scale.high, 8):
        parts += [
            line(scale(step), bottom, scale(step), bottom + 4, "tick"),
            text(scale(step), bottom + 16, short(step), css="axis", anchor="middle"),
        ]
    return [*parts, text(x - 6, bottom + 16, say("step"), css="axis", anchor="end")]


def _numbered(experts: int, row: float) -> list[int]:
    """The experts whose numbers have room beside rows of ``row`` pixels: all, or every 2nd, 4th, ..."""
    stride = next(2**n for n in range(32) if row * 2**n >= LABEL)
    return [*range(0, experts - stride, stride), experts - 1]


def _affinity_hover(
    labels: Sequence[str],
    counts_EL: Sequence[Sequence[int]],
    lift_EL: Floats,
    order: Sequence[int],
    plot: Plot,
) -> str:
    def title(row: int, column: int) -> str:
        expert = order[row]
        ratio, copies = lift_EL[expert, column], counts_EL[expert][column]
        share = copies / max(sum(counts_EL[expert]), 1)
        if np.isnan(ratio):
            return say("expert {expert}, {label}: never used", expert=expert, label=labels[column])
        return say(
            "expert {expert}, {label}: {ratio:.2f} × its usual share; {share:.0%} of its tokens ({copies:,})",
            expert=expert,
            label=labels[column],
            ratio=ratio,
            share=share,
            copies=copies,
        )

    return _grid(plot, len(order), len(labels), title)
