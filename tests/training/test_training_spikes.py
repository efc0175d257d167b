"""The watch over loss and gradient norm: what it finds, what enters its window, how a resume decides."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.config.optimizer import Spikes
from consilium.config.training import Training
from consilium.errors import ConsiliumError
from consilium.records.metrics import read_metrics
from consilium.report.build import build_report
from consilium.training import loop
from consilium.training.events import Event, Notice, Stepped
from consilium.training.loop import train
from consilium.training.spikes import FEWEST, PATIENCE, Watch
from consilium.training.step import StepResult, gradients
from training.test_training_resume import Killed, assert_same, configuration, killed_after, text

__all__ = ["text"]

values = st.floats(0.1, 10.0) | st.floats(20.0, 1e9) | st.just(math.nan) | st.just(math.inf)


def naive(history: list[tuple[float, float]], window: int, deviations: float) -> list[bool]:
    """Who jumps, by the whole history of ordinary steps each time."""
    ordinary: list[tuple[float, float]] = []
    row, found = 0, []
    for step in history:
        if not all(map(math.isfinite, step)):
            found.append(False)
            continue
        far = False
        for place in (0, 1):
            newest = [other[place] for other in ordinary[-window:]]
            if len(newest) >= FEWEST:
                middle = statistics.median(newest)
                spread = 1.4826 * statistics.median(abs(x - middle) for x in newest)
                far |= step[place] > middle + deviations * max(spread, 0.02 * abs(middle))
        found.append(far)
        row = row + 1 if far else 0
        if not far:
            ordinary.append(step)
        if row == PATIENCE:
            ordinary, row = [], 0
    return found


@given(st.lists(st.tuples(values, values), max_size=80), st.sampled_from([16, 20]), st.integers(0, 80))
def test_the_watch_equals_its_rule_also_when_it_is_saved_on_the_way(
    history: list[tuple[float, float]], window: int, stop: int
) -> None:
    config = Spikes(window=window, deviations=4.0)
    watch, found = Watch(config), []
    for i, (loss, norm) in enumerate(history):
        if i == stop:
            saved, watch = watch.state(), Watch(config)
            watch.restore({name: value.clone() for name, value in saved.items()})
        found.append(watch.see(loss, norm) is not None)
    assert found == naive(history, window, 4.0)


def test_what_is_not_finite_never_enters_the_window() -> None:
    watch = Watch(Spikes())
    for _ in range(200):
        watch.see(math.nan, 1.0)
        watch.see(1.0, math.inf)
    assert all(value.numel() == 0 or not value.any() for value in watch.state().values())


def test_a_level_that_stays_is_accepted() -> None:
    watch = Watch(Spikes())
    for _ in range(40):
        assert watch.see(1.0, 1.0) is None
    later = [watch.see(5.0, 1.0) is not None for _ in range(60)]
    assert later == [True] * PATIENCE + [False] * (60 - PATIENCE)


def jumping(at: set[int]) -> object:
    """Gradients of a step as they are, but told with a loss that jumped."""

    def jump(*arguments: object) -> StepResult:
        result = gradients(*arguments)
        return dataclasses.replace(result, loss=1e6) if arguments[3] in at else result

    return jump


@pytest.fixture
def config(text: Path) -> Training:
    spikes = Spikes(action="skip", window=16, deviations=50.0)
    return configuration(text, steps=24, save_every=4, spikes=spikes, accumulate=1)


def test_a_spike_is_skipped_told_and_recorded_and_a_resume_inside_the_window_decides_alike(
    config: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "gradients", jumping({19, 21}))
    told: list[Event] = []
    train(config, tmp_path / "whole", listeners=(told.append,))
    for step in (6, 18, 21):
        with pytest.raises(Killed):
            train(config, tmp_path / "broken", resume=True, listeners=(killed_after(step),))
    train(config, tmp_path / "broken", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "broken")
    assert [e.step for e in told if isinstance(e, Stepped) and e.result.skipped] == [20, 22]
    said = [event.text for event in told if isinstance(event, Notice)]
    assert any("step 20: the loss jumped to 1e+06, usual is" in text and "skipped" in text for text in said)
    records = read_metrics(tmp_path / "whole/metrics.jsonl").records
    assert [r.step for r in records if r.spike] == [r.step for r in records if r.skipped] == [20, 22]
    page = build_report(tmp_path / "whole").read_text()
    assert "jumped far above the steps before in 2 steps, first in step 20, last in step 22" in page


def test_steps_without_anything_to_learn_are_told_and_never_end_a_run(tmp_path: Path) -> None:
    """Long questions with short answers: most steps of two short rows hold questions alone."""
    records = [{"prompt": "q" * 90, "completion": f"{i % 10}"} for i in range(40)]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    short = configuration(path, steps=30, batch=1, accumulate=1, spikes=Spikes(action="skip", window=16))
    short = dataclasses.replace(short, data=dataclasses.replace(short.data, sequence_length=8))
    told: list[Event] = []
    train(short, tmp_path / "run", listeners=(told.append,))
    results = [event.result for event in told if isinstance(event, Stepped)]
    empty = [result.step + 1 for result in results if not result.targets]
    assert 10 < len(empty) < 30
    said = [event.text for event in told if isinstance(event, Notice)]
    assert [text for text in said if "skipped" in text] == [
        f"step {step}: none of its tokens are learned, skipped" for step in empty
    ]
    log = read_metrics(tmp_path / "run/metrics.jsonl").records
    assert [r.step for r in log if r.loss is not None and math.isnan(r.loss)] == empty
    assert all(r.bits_per_byte > 0 for r in log if r.bits_per_byte is not None)


def test_a_spike_that_is_told_only_changes_nothing(
    config: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, spikes=dataclasses.replace(config.spikes, action="tell"))
    train(config, tmp_path / "plain")
    monkeypatch.setattr(loop, "gradients", jumping({19}))
    told: list[Event] = []
    train(config, tmp_path / "told", listeners=(told.append,))
    assert any("jumped" in event.text for event in told if isinstance(event, Notice))
    weights = [
        (tmp_path / name / "checkpoints/step-24/model.safetensors").read_bytes() for name in ("plain", "told")
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"
            " allocate 80000000000 bytes. Error code 12"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_step_without_memory_says_where_it_went_and_what_takes_less(
    error: Exception, config: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> StepResult:
        if arguments[3] == 2:
            raise error
        return gradients(*arguments)

    monkeypatch.setattr(loop, "gradients", fail)
    with pytest.raises(
        ConsiliumError, match=r"out of memory in step 3.*: weights, gradients and optimizer"
    ) as told:
        train(config, tmp_path / "run")
    assert "4 sequences of 24 tokens" in str(told.value)
    assert "accumulate above 1" in str(told.value)
    assert ("more were asked for" in str(told.value)) == (
        "allocate 80" in str(error) or "20.00" in str(error)
    )
    assert (tmp_path / "run/checkpoints/step-2").is_dir()
