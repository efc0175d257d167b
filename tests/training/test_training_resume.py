from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import consilium
from consilium.checkpoint import store
from consilium.config import io
from consilium.config.data import Data, TextPath
from consilium.config.model import Model
from consilium.config.training import Bytes, Training
from consilium.data.corpus import build_corpus
from consilium.disk import atomic
from consilium.errors import ConsiliumError
from consilium.records.io import read_json
from consilium.records.loads import LoadFile
from consilium.records.metrics import read_metrics
from consilium.records.run import RunMeta
from consilium.training import loop
from consilium.training.events import Event, Finished, Listener, Notice, Saved, Stepped
from consilium.training.files import RunFiles
from consilium.training.loop import train
from consilium.training.run import loader_of
from consilium.training.schedule import learning_rate
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
    base = Training(
        model=model,
        tokenizer=Bytes(),
        data=data,
        steps=8,
        batch=4,
        accumulate=2,
        save_every=3,
        eval_tokens=64,
    )
    return dataclasses.replace(base, **changes)


class Killed(BaseException):
    """Like a kill nothing is saved on the way out; an error would be."""


def killed_after(step: int) -> Listener:
    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            raise Killed

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
        with pytest.raises(Killed):
            train(config, tmp_path / "broken", resume=True, listeners=(killed_after(step),))
    finished = train(config, tmp_path / "broken", resume=True)
    assert (finished.steps, finished.interrupted) == (8, False)
    assert_same(tmp_path / "whole", tmp_path / "broken")


def measured(finished: Finished) -> tuple[float, Mapping[str, float], dict[int, list[int]]]:
    assert finished.last is not None
    counts = {layer: load.counts for layer, load in finished.last.loads.items()}
    return finished.last.bits_per_byte, finished.last.domains, counts


def test_a_finished_run_resumes_to_itself(text: Path, tmp_path: Path) -> None:
    config = configuration(text)
    first = train(config, tmp_path / "run")
    again = train(config, tmp_path / "run", resume=True)
    assert again.steps == first.steps
    assert measured(again) == measured(first)


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
    with pytest.raises(
        ConsiliumError, match="started with seed = 0, not 5, and the seed has ordered the text"
    ):
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


def flip_a_bit(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 1
    path.write_bytes(damaged)


@pytest.mark.parametrize("damage", ["changed", "manifest gone"])
def test_a_damaged_newest_checkpoint_loses_no_step(damage: str, text: Path, tmp_path: Path) -> None:
    """The run falls back to the one before, says so, reaches the same end, and keeps what was damaged."""
    config = configuration(text)
    for name in ("whole", "run"):
        train(config, tmp_path / name)
    newest = tmp_path / "run/checkpoints/step-8"
    if damage == "changed":
        flip_a_bit(newest / "model.safetensors")
    else:
        (newest / "manifest.json").unlink()
    told: list[Event] = []
    finished = train(config, tmp_path / "run", resume=True, listeners=(told.append,))
    said = " ".join(event.text for event in told if isinstance(event, Notice))
    assert "kept as step-8.damaged; the run goes on from" in said
    assert [event.step for event in told if isinstance(event, Stepped)] == [7, 8]
    assert finished.checkpoint == newest
    assert (newest.parent / "step-8.damaged").is_dir()
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_left_alone(
    text: Path, tmp_path: Path
) -> None:
    config = configuration(text, keep=1)
    train(config, tmp_path / "run")
    flip_a_bit(tmp_path / "run/checkpoints/step-8/model.safetensors")
    metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(ConsiliumError, match=r"no checkpoint in .* is complete and unchanged: .*step-8"):
        train(config, tmp_path / "run", resume=True)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics


def test_records_are_durable_before_the_checkpoint_that_relies_on_them(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(RunFiles, "sync", lambda _: order.append("records"))
    save = store.save
    monkeypatch.setattr(store, "save", lambda *a, **k: (order.append("checkpoint"), save(*a, **k)))
    train(configuration(text, steps=4), tmp_path / "run")
    assert order == ["records", "checkpoint"] * 2


def test_a_disk_that_cannot_hold_a_checkpoint_is_known_before_the_first_step(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**16))
    with pytest.raises(ConsiliumError, match="no space left on the disk for a checkpoint"):
        train(configuration(text), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resume_before_any_checkpoint_says_so_and_keeps_the_records(text: Path, tmp_path: Path) -> None:
    config = configuration(text, save_every=100)
    with pytest.raises(Killed):
        train(config, tmp_path / "run", listeners=(killed_after(2),))
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    told: list[Event] = []
    train(config, tmp_path / "run", resume=True, listeners=(told.append,))
    assert any("starts anew from step 0" in event.text for event in told if isinstance(event, Notice))
    assert (tmp_path / "run/unsaved/metrics.jsonl").read_bytes() == before
    assert (tmp_path / "run/unsaved/routing/loads.bin").stat().st_size > 0


@pytest.mark.parametrize("step", [1, 5])
def test_an_error_in_a_listener_saves_the_step_before_it(step: int, text: Path, tmp_path: Path) -> None:
    config = configuration(text, save_every=100)
    train(config, tmp_path / "whole")

    def fail(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "run", listeners=(fail,))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{step}"]
    train(config, tmp_path / "run", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("moment", ["gradients", "update"])
def test_an_error_in_a_step_saves_the_last_whole_one(
    moment: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While weights move there is no step to save: half of a step would not resume to the same bits."""
    config = configuration(text, save_every=3)
    train(config, tmp_path / "whole")
    plain = getattr(loop, moment)
    calls: list[int] = []

    def fail(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 6:
            raise ZeroDivisionError
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, moment, fail)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "run")
    newest = {"gradients": "step-5", "update": "step-3"}[moment]
    assert max(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == newest
    train(config, tmp_path / "run", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_run_that_gives_up_saves_its_last_good_step(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilium.training.guard.is_healthy", lambda *_: False)
    with pytest.raises(ConsiliumError, match="not finite 10 steps in a row"):
        train(configuration(text, steps=20, save_every=100), tmp_path / "run")
    assert (tmp_path / "run/checkpoints/step-10").is_dir()


def test_a_run_saves_by_time(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is four minutes after the one before, so ten minutes are over now and then."""
    clock = itertools.count(time.monotonic(), 240)
    monkeypatch.setattr("consilium.training.loop.time.monotonic", lambda: next(clock))
    told: list[Event] = []
    config = configuration(text, steps=12, save_every=Training(model=DEEPSEEK, steps=1).save_every)
    train(config, tmp_path / "run", listeners=(told.append,))
    saved = [event.step for event in told if isinstance(event, Saved)]
    assert 3 <= len(saved) <= 6
    assert saved[-1] == 12


def test_what_may_change_on_a_resume_is_recorded(text: Path, tmp_path: Path) -> None:
    config = configuration(text, steps=4)
    train(config, tmp_path / "run")
    rate = dataclasses.replace(config.optimizer, learning_rate=1e-4)
    longer = dataclasses.replace(config, steps=6, batch=8, optimizer=rate, save_every=1, keep=9)
    told: list[Event] = []
    finished = train(longer, tmp_path / "run", resume=True, listeners=(told.append,))
    assert (finished.steps, finished.interrupted) == (6, False)
    assert io.read_yaml(Training, tmp_path / "run/config.yaml") == longer
    changes = read_json(RunMeta, tmp_path / "run/meta.json").changes
    assert {(c.step, c.key, c.before, c.after) for c in changes} == {
        (4, "steps", "4", "6"),
        (4, "batch", "4", "8"),
        (4, "optimizer.learning_rate", "0.003", "0.0001"),
        (4, "save_every", "3", "1"),
        (4, "keep", "2", "9"),
    }
    last = [event.result for event in told if isinstance(event, Stepped)][-1]
    assert last.rate == learning_rate(config.schedule, 1e-4, 5, 6)
    state = store.load_training_state(finished.checkpoint)
    assert state.scalars["rows"] == 4 * 4 + 2 * 8
    again = train(longer, tmp_path / "run", resume=True)
    assert (again.steps, measured(again)) == (finished.steps, measured(finished))


def test_another_batch_reads_on_where_the_text_was(text: Path) -> None:
    """No row twice and none left out: two steps of 8 rows after four of 4 are rows 16 to 31."""
    config = configuration(text)
    corpus = build_corpus(config.data, 300, start=config.tokenizer)
    plain = loader_of(config, corpus)
    wider = loader_of(dataclasses.replace(config, batch=8), corpus, (4, 16))
    for step in (4, 5):
        first = 16 + (step - 4) * 8
        rows = torch.cat([plain.batch(first // 4 + i).ids_BS for i in range(2)])
        assert torch.equal(wider.batch(step).ids_BS, rows)
        halves = [wider.micro(step, i, 2).ids_BS for i in range(2)]
        assert torch.equal(torch.cat(halves), rows)


def test_fewer_steps_than_have_run_are_refused(text: Path, tmp_path: Path) -> None:
    train(configuration(text, steps=4), tmp_path / "run")
    with pytest.raises(ConsiliumError, match="it has run 4 steps, more than the 3 asked for"):
        train(configuration(text, steps=3), tmp_path / "run", resume=True)


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
