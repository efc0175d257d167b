from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.errors import ConsiliumError
from consilium.records.loads import HEADER_FILE, LOADS_FILE, LoadFile, max_over_mean


@st.composite
def files(draw: st.DrawFn) -> tuple[list[int], int, list[list[list[int]]]]:
    layers = draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True).map(sorted))
    experts = draw(st.integers(1, 5))
    load_E = st.lists(st.integers(0, 2**31 - 1), min_size=experts, max_size=experts)
    load_LE = st.lists(load_E, min_size=len(layers), max_size=len(layers))
    return layers, experts, draw(st.lists(load_LE, max_size=6))


def written(run: Path, layers: list[int], experts: int, loads: list[list[list[int]]]) -> LoadFile:
    file = LoadFile.create(run, layers=layers, experts=experts)
    for step, load_LE in enumerate(loads, start=1):
        file.append(step, load_LE)
    return file


def contents(file: LoadFile) -> list[tuple[int, list[list[int]]]]:
    return [(step, [list(load_E) for load_E in load_LE]) for step, load_LE in file.read()]


@given(case=files())
def test_loads_survive_the_file(
    case: tuple[list[int], int, list[list[list[int]]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    written(run, *case)
    again = LoadFile.open(run)
    assert (list(again.header.layers), again.header.experts) == case[:2]
    assert contents(again) == list(enumerate(case[2], start=1))
    assert len(again) == len(case[2])


@given(case=files(), step=st.integers(0, 7), torn=st.integers(0, 200), fill=st.sampled_from([b"\xff", b"\0"]))
def test_truncation_keeps_what_is_not_later_and_drops_a_torn_tail_and_nuls(
    case: tuple[list[int], int, list[list[list[int]]]],
    step: int,
    torn: int,
    fill: bytes,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    run = tmp_path_factory.mktemp("run")
    layers, experts, loads = case
    file = written(run, *case)
    with file.path.open("ab") as tail:
        tail.write(fill * (torn if fill == b"\0" else min(torn, file.header.record_bytes - 1)))
    assert contents(file) == list(enumerate(loads, start=1))
    file.truncate(step)
    kept = list(enumerate(loads, start=1))[:step]
    assert contents(file) == kept
    file.append(step + 1, [[7] * experts for _ in layers])
    assert contents(file) == [*kept, (step + 1, [[7] * experts for _ in layers])]


def test_the_layout_is_what_the_module_says(tmp_path: Path) -> None:
    written(tmp_path, [1, 3], 2, [[[1, 2], [3, 4]]])
    assert (tmp_path / LOADS_FILE).read_bytes() == struct.pack("<q4i", 1, 1, 2, 3, 4)


def test_creating_again_starts_empty(tmp_path: Path) -> None:
    written(tmp_path, [0], 2, [[[1, 2]]])
    assert len(LoadFile.create(tmp_path, layers=[0], experts=3)) == 0


def test_a_header_of_another_kind_is_refused(tmp_path: Path) -> None:
    written(tmp_path, [0], 2, [])
    path = tmp_path / HEADER_FILE
    path.write_text(path.read_text().replace("int32", "int64"))
    with pytest.raises(ConsiliumError, match=r"loads\.json: dtype: input should be 'int32'"):
        LoadFile.open(tmp_path)


def test_a_run_without_loads_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match=r"cannot read .*loads\.json"):
        LoadFile.open(tmp_path)


def test_loads_of_another_shape_are_our_mistake(tmp_path: Path) -> None:
    file = LoadFile.create(tmp_path, layers=[0, 1], experts=2)
    with pytest.raises(AssertionError, match="1 layers of loads"):
        file.append(1, [[1, 2]])
    with pytest.raises(AssertionError, match="not of 2 experts"):
        file.append(1, [[1, 2], [3]])


def test_a_file_that_cannot_grow_is_one_sentence(tmp_path: Path) -> None:
    file = LoadFile.create(tmp_path, layers=[0], experts=1)
    file.path.unlink()
    file.path.mkdir()
    with pytest.raises(ConsiliumError, match=r"cannot save to .*loads\.bin"):
        file.append(1, [[1]])


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40))
def test_max_over_mean_is_at_least_one_and_at_most_the_experts(load_E: list[int]) -> None:
    ratio = max_over_mean(load_E)
    if sum(load_E) == 0:
        assert math.isnan(ratio)
    else:
        assert 1 - 1e-12 <= ratio <= len(load_E) + 1e-12
        assert ratio == pytest.approx(max(load_E) / (sum(load_E) / len(load_E)), rel=1e-12)
