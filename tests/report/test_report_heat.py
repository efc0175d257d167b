from __future__ import annotations

import base64
import math
import re
import struct
import zlib
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from consilium.records.loads import WINDOW, LoadFile, max_over_mean
from consilium.report.colours import LEVELS, MISSING, NEVER, PALETTE, indices
from consilium.report.load_map import MOST_COLUMNS, LoadMap, read_load_map
from consilium.report.png import SIGNATURE, indexed_png
from consilium.report.rasters import affinity, colour_bar, lift, load_strip, preferred_order

SVG = "{http://www.w3.org/2000/svg}"
XS = st.integers(1, 5)


def decode(png: bytes) -> tuple[np.ndarray, bytes]:
    """Pixels and palette of an indexed PNG, read chunk by chunk with its checksums."""
    assert png.startswith(SIGNATURE)
    at, chunks = len(SIGNATURE), {}
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size]) == (zlib.crc32(kind + data),)
        chunks[kind] = data
        at += 12 + size
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 3, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:], chunks[b"PLTE"]


def images(svg: str) -> list[np.ndarray]:
    return [decode(base64.b64decode(data))[0] for data in re.findall(r"data:image/png;base64,([^\"]*)", svg)]


def recorded(run: Path, load_SLE: np.ndarray) -> LoadMap:
    file = LoadFile.create(run, layers=range(load_SLE.shape[1]), experts=load_SLE.shape[2])
    for step, load_LE in enumerate(load_SLE.tolist(), start=1):
        file.append(step, load_LE)
    loads = read_load_map(run)
    assert loads is not None
    return loads


@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.integers(0, 2)))
def test_a_png_decodes_to_its_pixels(pixels: np.ndarray) -> None:
    again, palette = decode(indexed_png(pixels, [(1, 2, 3), (4, 5, 6), (7, 8, 9)], transparent=2))
    assert (again == pixels).all()
    assert palette == bytes(range(1, 10))


@given(st.floats(1e-9, 1e9))
def test_half_and_twice_are_equally_far_from_fair(ratio: float) -> None:
    low, fair, high = indices(np.array([1 / ratio, 1.0, ratio])).astype(int)
    assert fair == LEVELS // 2
    assert abs((fair - low) - (high - fair)) <= 1


def test_colours_tell_dead_and_unmeasured_from_small() -> None:
    assert indices(np.array([0.0, np.nan, 1e-12, 1e12])).tolist() == [NEVER, MISSING, 0, LEVELS - 1]
    assert len(set(PALETTE)) == len(PALETTE) <= 256


def test_blue_is_below_and_orange_above_the_neutral_middle() -> None:
    for level in range(LEVELS // 2):
        assert PALETTE[level][2] > PALETTE[level][0]
        assert PALETTE[LEVELS - 1 - level][0] > PALETTE[LEVELS - 1 - level][2]
    middle = PALETTE[LEVELS // 2]
    assert max(middle) - min(middle) <= 3


@given(
    load_SLE=st.tuples(st.integers(1, 70), XS, XS).flatmap(
        lambda shape: arrays(np.int64, shape, elements=st.integers(0, 1000))
    )
)
def test_a_load_map_agrees_with_a_loop(
    load_SLE: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> None:
    loads = recorded(tmp_path_factory.mktemp("run"), load_SLE)
    for layer in range(load_SLE.shape[1]):
        slow = [max_over_mean(load_E.tolist()) for load_E in load_SLE[:, layer]]
        assert loads.max_over_mean_LS[layer].tolist() == pytest.approx(slow, rel=1e-12, nan_ok=True)
        last = [ratio for ratio in slow[-WINDOW:] if math.isfinite(ratio)]
        final = sum(last) / len(last) if last else math.nan
        assert loads.final[layer].ratio == pytest.approx(final, rel=1e-12, nan_ok=True)
        dead = [e for e in range(load_SLE.shape[2]) if not load_SLE[-WINDOW:, layer, e].any()]
        assert loads.final[layer].dead == tuple(dead)


def test_columns_are_ratios_of_summed_loads(tmp_path: Path) -> None:
    steps = MOST_COLUMNS * 2
    load_SLE = np.random.default_rng(0).poisson(5, (steps, 1, 3))
    loads = recorded(tmp_path, load_SLE)
    assert loads.share_LEC.shape == (1, 3, MOST_COLUMNS)
    pair = load_SLE[2:4, 0].sum(axis=0)
    assert loads.share_LEC[0, :, 1].tolist() == pytest.approx((pair / pair.mean()).tolist())
    assert loads.first_C[:3].tolist() == [1, 3, 5]


def test_a_run_without_loads_has_no_map(tmp_path: Path) -> None:
    assert read_load_map(tmp_path) is None
    LoadFile.create(tmp_path, layers=[0], experts=2)
    assert read_load_map(tmp_path) is None


def test_a_strip_shows_its_layer_and_marks_the_dead(tmp_path: Path) -> None:
    load_SLE = np.full((10, 2, 4), 50)
    load_SLE[:, 1, 2] = 0
    load_SLE[:, 1, 0] = 100
    loads = recorded(tmp_path, load_SLE)
    even, uneven = load_strip(loads, 0, "layer 0"), load_strip(loads, 1, "layer 1")
    assert (images(even)[0] == LEVELS // 2).all()
    (pixels,) = images(uneven)
    assert (pixels[2] == NEVER).all()
    assert (pixels[0] > LEVELS // 2).all()
    assert even.count('class="cross"') == 0
    assert uneven.count('class="cross"') == 1
    titles = "".join(ET.fromstring(uneven).itertext())
    assert "expert 2 of layer 1 is dead" in titles
    assert "expert 0, from step 1: 2.00 × fair share" in titles
    assert "expert 2, from step 1: 0.00 × fair share" in titles


def test_hover_values_stop_at_their_budget(tmp_path: Path) -> None:
    loads = recorded(tmp_path, np.ones((30, 1, 8), dtype=np.int64))
    assert (
        sum(1 for _ in ET.fromstring(load_strip(loads, 0, "layer 0", hover_cells=50)).iter(f"{SVG}rect"))
        == 48
    )
    assert "<rect" not in load_strip(loads, 0, "layer 0", hover_cells=7)


@pytest.mark.parametrize(("steps", "experts"), [(1, 1), (1, 300), (700, 2)])
def test_strips_of_awkward_sizes_are_drawn(tmp_path: Path, steps: int, experts: int) -> None:
    loads = recorded(tmp_path, np.ones((steps, 1, experts), dtype=np.int64))
    (pixels,) = images(load_strip(loads, 0, "layer 0", width=500))
    assert pixels.shape == (experts, min(steps, MOST_COLUMNS))
    assert (pixels == LEVELS // 2).all()


@given(st.tuples(XS, XS).flatmap(lambda shape: arrays(np.int64, shape, elements=st.integers(0, 100))))
def test_lift_is_the_choice_given_the_label_over_the_choice(counts: np.ndarray) -> None:
    result, total = lift(counts.tolist()), counts.sum()
    for (expert, label), ratio in np.ndenumerate(result):
        row, column = counts[expert].sum(), counts[:, label].sum()
        if row and column:
            given_label, usual = counts[expert, label] / column, row / total
            assert ratio == pytest.approx(given_label / usual, rel=1e-9)
        else:
            assert math.isnan(ratio)
    assert sorted(preferred_order(result)) == list(range(counts.shape[0]))


def test_experts_are_grouped_by_the_label_they_prefer_and_unused_ones_come_last() -> None:
    counts = [[0, 0], [1, 9], [9, 1], [8, 2], [2, 8]]
    assert preferred_order(lift(counts)) == [2, 3, 1, 4, 0]


def test_an_affinity_map_names_expert_label_and_numbers() -> None:
    svg = affinity("layer 1: <domain>", ["code", "prose & more"], [[30, 10], [10, 30]])
    titles = [title.text for title in ET.fromstring(svg).iter(f"{SVG}title")]
    assert "expert 0, code: 1.50 × its usual share; 75% of its tokens (30)" in titles
    assert len(titles) == 4
    assert images(svg)[0].shape == (2, 2)
    assert "<title>" not in affinity("t", ["a", "b"], [[1, 2]], hover=False)


def test_a_map_of_nothing_is_drawn() -> None:
    (pixels,) = images(affinity("t", ["a", "b"], [[0, 0], [0, 0]]))
    assert (pixels == MISSING).all()


def test_the_colour_bar_shows_every_level_and_what_gets_no_token() -> None:
    bar, never = images(colour_bar("load"))
    assert bar.tolist() == [list(range(LEVELS))]
    assert never.tolist() == [[NEVER]]
