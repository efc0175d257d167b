from __future__ import annotations

import math
import re
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.report.bars import Bar, bar_chart
from consilium.report.lines import HOVER_POINTS, LineChart, Rule, Series, line_chart
from consilium.report.series import MOST_POINTS, points, smooth, thin
from consilium.report.svg import short, spread, ticks

SVG = "{http://www.w3.org/2000/svg}"
values = st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf])
curves = st.lists(st.tuples(st.integers(0, 10**7).map(float), values), max_size=60).map(
    lambda pairs: tuple(sorted(pairs, key=lambda point: point[0]))
)


def chart(*curves_of: tuple[tuple[float, float], ...], rules: tuple[Rule, ...] = ()) -> LineChart:
    series = tuple(Series(f"<curve> & {i}", curve, i) for i, curve in enumerate(curves_of))
    return LineChart("a title", "step", "bits", series, rules=rules, crosses=(3.0,), cross_label="skipped")


def drawn(of: LineChart) -> tuple[ET.Element, list[tuple[float, float]]]:
    """The parsed picture and every point of its curves."""
    root = ET.fromstring(line_chart(of))
    paths = [p.get("d", "") for p in root.iter(f"{SVG}path") if p.get("class", "").startswith("line")]
    pairs = re.findall(r"[ML](-?[0-9.]+) (-?[0-9.]+)", " ".join(paths))
    return root, [(float(x), float(y)) for x, y in pairs]


@given(st.lists(curves, max_size=4), st.lists(values, max_size=3))
def test_any_curves_are_drawn_inside_the_picture(
    many: list[tuple[tuple[float, float], ...]], at: list[float]
) -> None:
    of = chart(*many, rules=tuple(Rule(y, "rule") for y in at))
    root, places = drawn(of)
    assert all(0 <= x <= of.width and -0.1 <= y <= of.height for x, y in places)
    finite = sum(math.isfinite(y) for curve in many for _, y in curve)
    assert len(places) == finite
    assert ("no data yet" in "".join(root.itertext())) == (finite == 0)


def test_higher_values_stand_higher_and_later_steps_further_right() -> None:
    _, places = drawn(chart(((0.0, 1.0), (10.0, 5.0), (20.0, 3.0))))
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x0 < x1 < x2
    assert y1 < y2 < y0
    assert (y0 - y1) == pytest.approx(2 * (y0 - y2), abs=0.3)


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot() -> None:
    svg = line_chart(chart(((0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 2.0))))
    (path,) = re.findall(r'<path d="([^"]*)"', svg)
    assert path.count("M") == 2
    assert path.endswith("h0")
    assert path.count("h0") == 1


def test_hover_values_name_the_curve_step_and_value() -> None:
    root, _ = drawn(chart(((0.0, 1.0), (1200.0, 2.5))))
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert "<curve> & 0, step 1,200: 2.5 bits" in titles
    assert "skipped, step 3" in titles


def test_a_huge_run_stays_small() -> None:
    curve = tuple((float(i), math.sin(i / 1000)) for i in range(200_000))
    root, places = drawn(chart(curve))
    assert len(places) <= MOST_POINTS
    assert sum(1 for _ in root.iter(f"{SVG}circle")) <= HOVER_POINTS + 1


@given(st.lists(values, min_size=1, max_size=3000), st.integers(3, 300))
def test_thinning_keeps_extremes_and_order(ys: list[float], most: int) -> None:
    curve = [(float(x), y) for x, y in enumerate(ys)]
    kept = thin(curve, most)
    assert len(kept) <= most
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    finite = [y for y in ys if math.isfinite(y)]
    shown = [y for _, y in kept if math.isfinite(y)]
    assert (min(finite, default=0), max(finite, default=0)) == (min(shown, default=0), max(shown, default=0))
    assert any(math.isfinite(y) for y in ys) == bool(shown)
    assert all(math.isfinite(y) for y in ys) == all(math.isfinite(y) for _, y in kept)


@given(st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), max_size=60), st.integers(0, 10))
def test_smoothing_is_a_centred_mean_but_at_the_end(ys: list[float], span: int) -> None:
    finite = [(float(x), y) for x, y in enumerate(ys) if math.isfinite(y)]
    slow: list[float] = []
    for place in range(len(finite)):
        reach = min(span, place)
        around = [
            y
            for x, y in finite
            if finite[place - reach][0] <= x <= finite[min(place + reach, len(finite) - 1)][0]
        ]
        slow.append(math.fsum(around) / len(around))
    result = smooth([(float(x), y) for x, y in enumerate(ys)], span)
    assert [x for x, _ in result] == [x for x, _ in finite]
    assert [y for _, y in result] == pytest.approx(slow, abs=1e-8)


def test_what_was_not_measured_is_dropped_and_nan_is_kept() -> None:
    kept = points([(0, 1.0), (1, None), (2, math.nan)])
    assert [x for x, _ in kept] == [0, 2]


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12), st.integers(2, 10))
def test_ticks_are_few_and_inside(low: float, reach: float, most: int) -> None:
    low, high = spread([low, low + reach])
    found = ticks(low, high, most)
    assert len(found) <= most + 1
    slack = (high - low) * 1e-6
    assert all(low - slack <= tick <= high + slack for tick in found)


@given(st.lists(values, max_size=10), st.booleans())
def test_a_spread_is_never_empty(ys: list[float], zero: bool) -> None:
    low, high = spread(ys, zero=zero)
    assert low < high
    assert all(low <= y <= high for y in ys if math.isfinite(y))
    assert not zero or low <= 0 <= high


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (1.5, "1.5"),
        (999.6, "1k"),
        (4790, "4.79k"),
        (8_120_000, "8.12M"),
        (671_026_404_352, "671G"),
        (-2500, "-2.5k"),
        (math.nan, "n/a"),
    ],
)
def test_short_numbers(value: float, expected: str) -> None:
    assert short(value) == expected


@given(
    st.lists(st.tuples(st.text(st.characters(codec="utf-8", categories=["L", "S", "P"])), values), max_size=6)
)
def test_bars_are_as_long_as_their_values(pairs: list[tuple[str, float]]) -> None:
    bars = tuple(Bar(label, abs(value)) for label, value in pairs)
    root = ET.fromstring(bar_chart("a title", "bits", bars))
    widths = [float(rect.get("width", "nan")) for rect in root.iter(f"{SVG}rect")]
    finite = [bar.value for bar in bars if math.isfinite(bar.value)]
    longest = max(finite, default=0.0)
    for bar, width in zip(bars, widths, strict=True):
        share = bar.value / longest if math.isfinite(bar.value) and longest else 0.0
        assert width == pytest.approx(share * max(widths), abs=0.2)
