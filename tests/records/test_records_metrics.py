from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.errors import ConsiliumError
from consilium.records.metrics import append_step, from_line, read_metrics, to_line, truncate_metrics
from consilium.records.run import StepRecord

numbers = st.floats(allow_nan=False, allow_infinity=False)
maybe = st.none() | numbers
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
records = st.builds(
    StepRecord,
    step=st.integers(0, 10**9),
    tokens=st.integers(0, 10**15),
    loss=maybe,
    ce=maybe,
    grad_norm=maybe,
    lr=maybe,
    tok_per_sec=maybe,
    skipped=st.sampled_from([None, 0.0, 1.0]),
    bits_per_byte=maybe,
    max_over_mean=maybe,
    dead_experts=maybe,
    router_entropy=maybe,
    dropped_frac=maybe,
    domains=st.dictionaries(names, numbers, max_size=3),
    layers=st.dictionaries(st.integers(0, 999), numbers, max_size=3),
    losses=st.dictionaries(names, numbers, max_size=3),
    other=st.dictionaries(names.map("other/{}".format), numbers, max_size=3),
)


def at(step: int) -> StepRecord:
    return StepRecord(step=step, tokens=step * 10, loss=1.0 / (step + 1))


@given(records)
def test_a_step_survives_its_line(record: StepRecord) -> None:
    line = to_line(record)
    assert line.count("\n") == 1
    assert from_line(line) == record


def test_the_keys_that_scripts_rely_on() -> None:
    record = StepRecord(
        step=1,
        tokens=2,
        loss=3.0,
        ce=4.0,
        grad_norm=5.0,
        lr=6.0,
        tok_per_sec=7.0,
        skipped=0.0,
        bits_per_byte=8.0,
        domains={"code": 9.0},
        max_over_mean=10.0,
        dead_experts=11.0,
        router_entropy=12.0,
        dropped_frac=13.0,
        bias_spread=16.0,
        layers={3: 14.0},
        losses={"sequence": 15.0},
    )
    assert json.loads(to_line(record)) == {
        "step": 1,
        "tokens": 2,
        "train/loss": 3.0,
        "train/ce": 4.0,
        "train/grad_norm": 5.0,
        "train/lr": 6.0,
        "train/tok_per_sec": 7.0,
        "train/skipped": 0.0,
        "val/bits_per_byte": 8.0,
        "val/bits_per_byte/code": 9.0,
        "moe/max_over_mean": 10.0,
        "moe/dead_experts": 11.0,
        "moe/router_entropy": 12.0,
        "moe/dropped_frac": 13.0,
        "moe/bias_spread": 16.0,
        "moe/layer_3/max_over_mean": 14.0,
        "moe/loss/sequence": 15.0,
    }


@given(st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_finite_is_null_and_nan_when_read(value: float) -> None:
    line = to_line(StepRecord(step=1, tokens=1, loss=value, layers={0: value}, other={"x": value}))
    assert json.loads(line)["train/loss"] is None
    again = from_line(line)
    assert again.ce is None
    assert all(math.isnan(v) for v in (again.loss or 0.0, again.layers[0], again.other["x"]))


def test_unknown_numbers_are_kept() -> None:
    line = '{"step": 1, "tokens": 2, "moe/layer_x/max_over_mean": 3.0, "train/extra": 4}\n'
    assert from_line(line).other == {"moe/layer_x/max_over_mean": 3.0, "train/extra": 4.0}
    assert json.loads(to_line(from_line(line))) == json.loads(line)


def test_records_append_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(5):
        append_step(path, at(step))
    metrics = read_metrics(path)
    assert metrics.records == tuple(at(step) for step in range(5))
    assert metrics.torn is None


def test_a_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl").records == ()


@given(cut=st.integers(1, 200))
def test_a_crash_costs_the_last_line_at_most(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    lines = [to_line(at(step)) for step in range(4)]
    whole = "".join(lines).encode()
    path.write_bytes(whole[: len(whole) - min(cut, len(lines[-1]))])
    metrics = read_metrics(path)
    # Without its newline alone the last record is still whole.
    complete = 4 if cut == 1 else 3
    assert metrics.records == tuple(at(step) for step in range(complete))
    assert (metrics.torn is not None) == (1 < cut < len(lines[-1]))


@pytest.mark.parametrize("before", ["", '{"step": 2, "tok'])
@pytest.mark.parametrize("after", ["", "\n", '{"step": 3, "tokens": 3}\n'])
def test_nuls_of_a_power_cut_are_dropped_and_told(before: str, after: str, tmp_path: Path) -> None:
    """Blocks that were given to the file and never written are NULs; a later block may have been written."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(to_line(at(0)) + to_line(at(1)) + before + "\0" * 4096 + after)
    metrics = read_metrics(path)
    whole_after = after.startswith("{") and not before
    assert [record.step for record in metrics.records] == [0, 1, *([3] if whole_after else [])]
    assert (metrics.torn is None) == whole_after
    assert truncate_metrics(path, 1) == metrics
    assert path.read_text() == to_line(at(0)) + to_line(at(1))


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(to_line(at(0)) + '{"step": "x"}\n' + to_line(at(2)))
    with pytest.raises(ConsiliumError, match=r"metrics\.jsonl line 2 is not a record of a step; remove"):
        read_metrics(path)


@pytest.mark.parametrize(
    "line", ["", "[]", "3", '{"tokens": 1}', '{"step": -1, "tokens": 1}', '{"step": 1.5}']
)
def test_what_is_no_record_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="validation error"):
        from_line(line)


@given(
    steps=st.lists(st.integers(0, 30), max_size=12).map(sorted),
    step=st.integers(0, 30),
    tail=st.sampled_from(["", '{"step": 3']),
)
def test_truncation_keeps_what_is_not_later(
    steps: list[int], step: int, tail: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    path.write_text("".join(to_line(at(s)) for s in steps) + tail)
    truncate_metrics(path, step)
    assert read_metrics(path).records == tuple(at(s) for s in steps if s <= step)
    append_step(path, at(step + 1))
    assert read_metrics(path).records[-1] == at(step + 1)


def test_a_folder_in_the_place_of_the_file_is_one_sentence(tmp_path: Path) -> None:
    for act in (lambda: append_step(tmp_path, at(0)), lambda: read_metrics(tmp_path)):
        with pytest.raises(ConsiliumError, match=r"cannot (read|save to) "):
            act()
