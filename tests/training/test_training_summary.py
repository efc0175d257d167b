"""A summary tells of the whole run, however often it was stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from consilium.config.data import Data, TextPath
from consilium.config.training import Bytes, Training
from consilium.model.build import build
from consilium.moe.balance import Balance
from consilium.recipes.variants import dense_twin
from consilium.records.io import read_json
from consilium.records.metrics import METRICS_FILE, read_metrics
from consilium.records.run import SUMMARY_FILE, BitsPerByte, Sample, StepRecord, Summary
from consilium.training.budget import Minutes, Steps, missed
from consilium.training.events import Event, Stepped
from consilium.training.loop import train
from consilium.training.measures import bias_spread
from consilium.training.summary import spent, write_summary
from small import DEEPSEEK, DENSE


class Killed(BaseException):
    """Nothing is saved on the way out."""


def crash(event: Event) -> None:
    if isinstance(event, Stepped) and event.step == 4:
        raise Killed


def record(step: int, tokens: int, speed: float | None) -> StepRecord:
    return StepRecord(step=step, tokens=tokens, tok_per_sec=speed)


def test_a_logged_step_stands_for_those_before_it() -> None:
    records = [record(0, 0, None), record(1, 10, 5.0), record(3, 30, 10.0), record(3, 30, None)]
    assert spent(records) == 10 / 5 + 20 / 10
    assert spent([]) == 0.0


def test_time_and_speed_are_those_of_all_processes(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("".join(f"line {i} of many.\n" for i in range(400)))
    data = Data(sources=(TextPath(path=str(text)),), sequence_length=24)
    config = Training(
        model=DENSE, tokenizer=Bytes(), data=data, steps=6, batch=2, eval_tokens=64, save_every=3
    )
    with pytest.raises(Killed):
        train(config, tmp_path / "run", listeners=(crash,))
    first = write_summary(tmp_path / "run", train(config, tmp_path / "run", resume=True))
    records = read_metrics(tmp_path / "run" / METRICS_FILE).records
    assert [r.step for r in records if r.tok_per_sec] == [1, 2, 3, 4, 5, 6]
    assert first.seconds == pytest.approx(spent(records))
    assert first.tokens_per_second == pytest.approx(first.tokens / first.seconds)
    assert write_summary(tmp_path / "run", train(config, tmp_path / "run", resume=True)) == first


def test_a_finished_run_keeps_its_figures(tmp_path: Path) -> None:
    """From Python a run leaves summary and report; going on erases nothing that others compared it with."""
    text = tmp_path / "a.txt"
    text.write_text("".join(f"line {i} of many.\n" for i in range(400)))
    data = Data(sources=(TextPath(path=str(text)),), sequence_length=24)
    config = Training(model=DENSE, tokenizer=Bytes(), data=data, steps=1, batch=2, eval_tokens=64)
    finished = train(config, tmp_path / "run")
    assert finished.report.read_text().startswith("<!DOCTYPE html>")
    bits, sample = BitsPerByte(domains={"txt": 2.0}), Sample(prompt="a", text="b")
    write_summary(tmp_path / "run", finished, trigram=bits, xz=bits, sample=sample)
    before = read_json(Summary, tmp_path / "run" / SUMMARY_FILE)
    train(config, tmp_path / "run", resume=True)
    assert read_json(Summary, tmp_path / "run" / SUMMARY_FILE) == before
    train(dataclasses.replace(config, steps=2), tmp_path / "run", resume=True)
    longer = read_json(Summary, tmp_path / "run" / SUMMARY_FILE)
    assert (longer.steps, longer.trigram, longer.xz, longer.sample) == (2, bits, bits, None)


def test_the_untrained_model_is_measured_on_a_tenth_of_the_run_at_most(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("".join(f"line {i} of many.\n" for i in range(4000)))
    data = Data(sources=(TextPath(path=str(text)),), sequence_length=24)
    config = Training(model=DENSE, tokenizer=Bytes(), data=data, steps=20, batch=4)
    finished = train(config, tmp_path / "run")
    assert finished.first is not None
    assert finished.last is not None
    assert 0 < finished.first.tokens <= 0.1 * finished.tokens < finished.last.tokens


def test_the_spread_of_the_bias_is_that_of_the_worst_layer() -> None:
    model = build(DEEPSEEK, seed=0)
    biases = [module.bias_E for module in model.modules() if isinstance(module, Balance)]
    assert len(biases) > 1
    for layer, bias_E in enumerate(biases):
        assert bias_E is not None
        bias_E[0], bias_E[-1] = -0.5 * layer, 0.25
    assert bias_spread(model) == 0.25 + 0.5 * (len(biases) - 1)
    assert bias_spread(build(dense_twin(DEEPSEEK), seed=0)) is None


def test_a_run_far_from_its_minutes_says_so() -> None:
    for seconds in (41.0, 60.0, 89.0):
        assert missed(Minutes(1), seconds) is None
    for seconds in (8.0, 91.0):
        said = missed(Minutes(1), seconds)
        assert said is not None
        assert f"{seconds:.0f} s of training for the 60 s asked for" in said
    assert missed(Steps(3), 1e9) is None
