"""Points of a curve: cut to what a screen can show, and smoothed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

Point = tuple[float, float]

MOST_POINTS = 1500


def points(pairs: Iterable[tuple[float, float | None]]) -> tuple[Point, ...]:
    """Drop what was not measured; keep NaN, which breaks the line."""
    return tuple((x, y) for x, y in pairs if y is not None)


def thin(curve: Sequence[Point], most: int = MOST_POINTS) -> tuple[Point, ...]:
    """At most ``most`` points that keep every bucket's lowest and highest value, so that spikes stay visible.

    A bucket with a value that is not finite keeps one such point, so that gaps stay visible too.
    """
    if len(curve) <= most:
        return tuple(curve)
    buckets = most // 3
    kept: list[Point] = []
    for bucket in range(buckets):
        part = curve[bucket * len(curve) // buckets : (bucket + 1) * len(curve) // buckets]
        finite = [point for point in part if math.isfinite(point[1])]
        chosen = {point for point in part if not math.isfinite(point[1])}
        kept += sorted({*_extremes(finite), *list(chosen)[:1]}, key=lambda point: point[0])
    return tuple(kept)


def smooth(curve: Sequence[Point], span: int) -> tuple[Point, ...]:
    """Mean of the points up to ``span`` places away on either side, NaN left out. No lag but at the end.

    At the start, where a curve falls fast, the window shrinks; at the end it does not, lest noise end it.
    """
    finite = [point for point in curve if math.isfinite(point[1])]
    sums = [0.0, *accumulate(y for _, y in finite)]
    result: list[Point] = []
    for place, (x, _) in enumerate(finite):
        low, high = place - min(span, place), min(place + min(span, place) + 1, len(finite))
        result.append((x, (sums[high] - sums[low]) / (high - low)))
    return tuple(result)


def _extremes(part: Sequence[Point]) -> tuple[Point, ...]:
    if not part:
        return ()
    return (min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1]))
