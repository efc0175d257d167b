from __future__ import annotations

import dataclasses
import io as streams
from pathlib import Path

import pytest
import torch
from rich.console import Console

from consilium.cli.demo import readable
from consilium.cli.live import Page, clock, load_bars
from consilium.config.training import Training
from consilium.evaluation.bits import Evaluation
from consilium.evaluation.loads import ExpertLoad
from consilium.training.events import Evaluated, Notice, Saved, Started, Stepped
from consilium.training.step import StepResult
from small import DEEPSEEK


def step(number: int) -> Stepped:
    load = ExpertLoad(torch.tensor([0, 1, 2, 5]), torch.tensor([0, 1, 2, 5]), 1.0)
    result = StepResult(2.5, 2.25, 0.25, {}, 1.0, 1e-3, 48, {1: load}, skipped=False, step=number, targets=48)
    return Stepped(number, result, 48 * number, 1234.5, 61.0)


def shown(console: Console) -> str:
    config = Training(model=DEEPSEEK, steps=10)
    with Page(console) as page:
        page(Started(config, Path("runs/x"), 0))
        page(Evaluated(0, Evaluation(3.5, {"code": 3.5}, 10)))
        page(step(1))
        page(Notice("look here"))
        page(Saved(1, Path("runs/x/checkpoints/step-1")))
    output = console.file
    assert isinstance(output, streams.StringIO)
    return output.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_page_shows_loss_speed_time_left_and_load(terminal: bool) -> None:
    text = shown(Console(file=streams.StringIO(), force_terminal=terminal, width=120))
    for part in (
        "step     1/10",
        "loss 2.250",
        "held-out 3.500",
        "1,234 tok/s",
        "ETA 1:01",
        "2.50",
        "look here",
    ):
        assert part in text, part
    assert ("layer 1" in text) == terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_said_of_the_load_of_a_dense_model(terminal: bool) -> None:
    console = Console(file=streams.StringIO(), force_terminal=terminal, width=120)
    sparse = step(1)
    with Page(console) as page:
        page(Started(Training(model=DEEPSEEK, steps=1), Path("runs/x"), 0))
        page(dataclasses.replace(sparse, result=dataclasses.replace(sparse.result, loads={})))
    assert isinstance(console.file, streams.StringIO)
    text = console.file.getvalue()
    assert "step     1/1" in text
    assert "max/mean" not in text
    assert "expert load" not in text


def test_a_dumb_terminal_gets_lines_as_a_file_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    text = shown(Console(file=streams.StringIO(), force_terminal=True, width=120))
    assert "step     1/10" in text
    assert "\r" not in text
    assert "\x1b[" not in text


def test_the_last_step_is_always_told() -> None:
    console = Console(file=streams.StringIO(), force_terminal=False, width=120)
    with Page(console) as page:
        page(Started(Training(model=DEEPSEEK, steps=3), Path("runs/x"), 0))
        for number in (1, 2, 3):
            page(step(number))
    assert isinstance(console.file, streams.StringIO)
    assert [line[:10] for line in console.file.getvalue().splitlines()[1:]] == ["step     1", "step     3"]


def test_a_sample_of_line_breaks_is_short() -> None:
    assert readable("def f():\n" + "\n" * 80) == "  | def f():\n  | (81 empty lines)"
    assert readable("a\n\nb") == "  | a\n  | \n  | b"
    assert readable("a\n" * 80).splitlines()[-1] == "  | ..."


def test_bars_show_idle_fair_and_crowded_experts() -> None:
    bars = load_bars([0, 1, 1, 2])
    assert bars[0] == "·"
    assert bars[1] == bars[2] == "▄"
    assert bars[3] == "█"
    assert load_bars([0, 0]) == "··"


def test_the_clock_counts_minutes() -> None:
    assert (clock(0.4), clock(59.6), clock(125)) == ("0:00", "1:00", "2:05")
