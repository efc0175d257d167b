"""A summary tells of the whole run, however often it was stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from consilium.config.training import Bytes, Data, TextPath, Training
from consilium.records.metrics import METRICS_FILE, read_metrics
from consilium.records.run import StepRecord
from consilium.training.budget import Minutes, Steps, missed
from consilium.training.events import Event, Stepped
from consilium.training.loop import train
from consilium.training.summary import spent, write_summary
from small import DENSE


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


def test_a_run_far_from_its_minutes_says_so() -> None:
    for seconds in (41.0, 60.0, 89.0):
        assert missed(Minutes(1), seconds) is None
    for seconds in (8.0, 91.0):
        said = missed(Minutes(1), seconds)
        assert said is not None
        assert f"{seconds:.0f} s of training for the 60 s asked for" in said
    assert missed(Steps(3), 1e9) is None
