from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import consilium
from consilium.checkpoint import store
from consilium.config.model import Model
from consilium.config.training import Bytes, Data, TextPath, Training
from consilium.disk import atomic
from consilium.errors import ConsiliumError
from consilium.records.loads import LoadFile
from consilium.records.metrics import read_metrics
from consilium.training.events import Event, Finished, Listener, Notice, Stepped
from consilium.training.loop import train
from small import DEEPSEEK, SWITCH

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name in ("a", "b"):
        for i in range(6):
            path = folder / name / f"{i}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(f"{name} line {i * j} of {j}.\n" for j in range(30)))
    return folder


def configuration(text: Path, model: Model = DEEPSEEK, **changes: object) -> Training:
    data = Data(sources=(TextPath(path=str(text)),), sequence_length=24)
    base = Training(model=model, tokenizer=Bytes(), data=data, steps=8, batch=4, accumulate=2, save_every=3, eval_tokens=64)
    return dataclasses.replace(base, **changes)


class Crash(Exception):
    pass


def crash_after(step: int) -> Listener:
    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            raise Crash

    return listen


def test_a_run_folder_may_be_a_path_or_a_str(text: Path, tmp_path: Path) -> None:
    finished = consilium.train(configuration(text, steps=1), str(tmp_path / "run"))
    assert finished.checkpoint == tmp_path / "run" / "checkpoints" / "step-1"
    assert finished.checkpoint.is_dir()


def final_state(out: Path) -> dict[str, torch.Tensor]:
    folder = atomic.latest(out / "checkpoints")
    assert folder is not None
    weights = store.load(folder).state_dict()
    return {**weights, **store.load_training_state(folder).tensors}


def assert_same(one: Path, two: Path) -> None:
    first, second = final_state(one), final_state(two)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    steps = [
        [(r.step, r.loss, r.bits_per_byte) for r in read_metrics(out / "metrics.jsonl").records]
        for out in (one, two)
    ]
    assert steps[0] == steps[1]
    assert list(LoadFile.open(one).read()) == list(LoadFile.open(two).read())


@pytest.mark.parametrize("model", [DEEPSEEK, SWITCH], ids=["deepseek", "switch with noise and drops"])
@pytest.mark.parametrize("crashes", [(1,), (4,), (7,), (2, 5, 6, 7)], ids=str)
def test_a_run_that_crashed_reaches_the_same_bits(
    model: Model, crashes: tuple[int, ...], text: Path, tmp_path: Path
) -> None:
    config = configuration(text, model)
    train(config, tmp_path / "whole")
    for step in crashes:
        with pytest.raises(Crash):
            train(config, tmp_path / "broken", resume=True, listeners=(crash_after(step),))
    finished = train(config, tmp_path / "broken", resume=True)
    assert (finished.steps, finished.interrupted) == (8, False)
    assert_same(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.timeout(400)
def test_runs_killed_at_random_moments_reach_the_same_bits(
    text: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    done = subprocess.run(
        [sys.executable, str(TESTS / "training/kills.py"), str(tmp_path), str(text), "50"],
        capture_output=True,
        text=True,
        timeout=390,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    record_property("trials", result["kills"])
    record_property("failures", result["wrong"])
    assert result["kills"] >= 50
    assert result["wrong"] == 0, result


def test_a_finished_run_resumes_to_itself(text: Path, tmp_path: Path) -> None:
    config = configuration(text)
    first = train(config, tmp_path / "run")
    again = train(config, tmp_path / "run", resume=True)
    assert again.steps == first.steps
    assert again.last == first.last


def test_only_the_newest_checkpoints_stay(text: Path, tmp_path: Path) -> None:
    train(configuration(text, keep=1), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-8"]


def test_a_folder_with_a_run_is_not_overwritten(text: Path, tmp_path: Path) -> None:
    config = configuration(text, steps=1)
    train(config, tmp_path / "run")
    with pytest.raises(ConsiliumError, match="already holds a run; add --resume"):
        train(config, tmp_path / "run")


def test_other_settings_do_not_resume(text: Path, tmp_path: Path) -> None:
    train(configuration(text, steps=1), tmp_path / "run")
    with pytest.raises(ConsiliumError, match="started with seed = 0, not 5"):
        train(configuration(text, steps=1, seed=5), tmp_path / "run", resume=True)


def test_other_text_does_not_resume(text: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "a.txt").write_text("one\n" * 400)
    config = configuration(own, steps=1)
    train(config, tmp_path / "run")
    (own / "a.txt").write_text("two\n" * 400)
    with pytest.raises(ConsiliumError, match="training text has changed"):
        train(config, tmp_path / "run", resume=True)


def test_a_damaged_checkpoint_is_named_and_not_loaded(text: Path, tmp_path: Path) -> None:
    config = configuration(text)
    train(config, tmp_path / "run")
    weights = tmp_path / "run/checkpoints/step-8/model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-100] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(ConsiliumError, match=r"model\.safetensors"):
        train(config, tmp_path / "run", resume=True)


def test_another_number_of_threads_is_told(text: Path, tmp_path: Path) -> None:
    config = configuration(text, steps=2)
    train(config, tmp_path / "run")
    state = tmp_path / "run/checkpoints/step-2/training_state/state.json"
    folder = tmp_path / "run/checkpoints/step-2"
    content = state.read_text()
    told: list[Event] = []
    saved = store.load_training_state(folder)
    changed = store.TrainingState(saved.tensors, {**saved.scalars, "threads": 64})
    store.save(store.load(folder), folder, training_state=changed)
    assert state.read_text() != content
    train(config, tmp_path / "run", resume=True, listeners=(told.append,))
    assert any("threads" in event.text for event in told if isinstance(event, Notice))


def test_listeners_hear_the_whole_story(text: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    finished = train(configuration(text, eval_every=4), tmp_path / "run", listeners=(heard.append,))
    kinds = [type(event).__name__ for event in heard if not isinstance(event, Notice)]
    assert kinds == (
        ["Started", "Evaluated"]
        + ["Stepped"] * 3
        + ["Saved", "Stepped", "Evaluated", "Stepped", "Stepped", "Saved", "Stepped", "Stepped"]
        + ["Saved", "Evaluated", "Finished"]
    )
    assert isinstance(heard[-1], Finished)
    assert heard[-1] == finished
    assert finished.first is not None
    assert finished.last.bits_per_byte < finished.first.bits_per_byte
