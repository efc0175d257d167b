"""What is saved behind a run: a true snapshot, one at a time, failures told, and the same bits in the end."""

from __future__ import annotations

import dataclasses
import errno
import threading
from pathlib import Path

import pytest
import torch

from consilium.checkpoint import store
from consilium.config.optimizer import Exponential
from consilium.config.training import Training
from consilium.data.corpus import build_corpus
from consilium.disk import atomic
from consilium.errors import ConsiliumError
from consilium.planner.training import run_memory
from consilium.training.events import Event, Saved, Stepped
from consilium.training.files import locked
from consilium.training.loop import train
from consilium.training.run import Site, open_run, save_run, saved
from consilium.training.saving import Saver, Written
from training.test_training_resume import Killed, assert_same, configuration, killed_after, text

__all__ = ["text"]


@pytest.fixture
def config(text: Path) -> Training:
    return configuration(text, saving="background", average=Exponential(decay=0.5), accumulate=1)


def test_what_is_written_is_what_was_there_when_the_save_began(
    config: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor is overwritten while the disk is slow, as a step does it."""
    train(dataclasses.replace(config, steps=2), tmp_path / "run")
    corpus = build_corpus(config.data, config.model.vocab_size, start=config.tokenizer)
    run = open_run(config, Site(tmp_path / "run", corpus, "cpu", print), resume=True)
    before = store.load(tmp_path / "run").state_dict()
    state = store.load_training_state(tmp_path / "run/checkpoints/step-2")
    mutated, save = threading.Event(), store.save

    def slow(*arguments: object, **options: object) -> None:
        assert mutated.wait(60)
        save(*arguments, **options)

    monkeypatch.setattr(store, "save", slow)
    save_run(run)
    assert saved(run, wait=False) is None
    with torch.no_grad():
        for tensor in (*run.model.state_dict().values(), *run.average.content(run.model).weights.values()):
            tensor.fill_(7)
        for rule in run.optimizer.rules:
            for moments in rule.state.values():
                for value in moments.values():
                    value.fill_(7)
    run.watch.see(123.0, 123.0)
    run.progress.tokens += 1000
    mutated.set()
    assert saved(run).step == 2
    run.saver.close()
    folder = tmp_path / "run/checkpoints/step-2"
    assert all(torch.equal(before[name], tensor) for name, tensor in store.load(folder).state_dict().items())
    found = store.load_training_state(folder)
    assert found.scalars == state.scalars
    assert found.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in state.tensors.items())
    averaged = store.load(folder / "average").state_dict()
    assert not any(bool((tensor == 7).all()) for name, tensor in averaged.items() if "bias_E" not in name)


def test_a_run_that_saves_behind_itself_reaches_the_same_bits_through_kills(
    config: Training, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, save_every=2)
    train(dataclasses.replace(config, saving="blocking"), tmp_path / "whole")
    for step in (3, 5, 6):
        with pytest.raises(Killed):
            train(config, tmp_path / "broken", resume=True, listeners=(killed_after(step),))
    told: list[Event] = []
    train(config, tmp_path / "broken", resume=True, listeners=(told.append,))
    assert_same(tmp_path / "whole", tmp_path / "broken")
    assert [event.step for event in told if isinstance(event, Saved)][-1] == 8
    names = [
        folder / "checkpoints/step-8/average/model.safetensors"
        for folder in (tmp_path / "whole", tmp_path / "broken")
    ]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_failure_behind_the_run_is_told_at_the_next_step_and_the_checkpoint_before_is_whole(
    config: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = atomic.commit_folder
    failed: list[Path] = []

    def fail(destination: Path, *arguments: object, **options: object) -> None:
        if destination.name in ("step-4", "step-5"):
            failed.append(destination)
            raise ConsiliumError(f"cannot save to {destination}: no space left on the disk.")
        plain(destination, *arguments, **options)

    monkeypatch.setattr(store, "commit_folder", fail)
    told: list[Event] = []

    def listen(event: Event) -> None:
        told.append(event)
        if isinstance(event, Stepped):
            for thread in threading.enumerate():
                if thread.name.startswith("save"):
                    threading.Event().wait(0.2)

    config = dataclasses.replace(config, save_every=2)
    with pytest.raises(ConsiliumError, match="step-4: no space left"):
        train(config, tmp_path / "run", listeners=(listen,))
    assert max(event.step for event in told if isinstance(event, Stepped)) <= 6
    assert atomic.latest(tmp_path / "run/checkpoints").name in ("step-2", "step-6")


def test_a_failure_of_the_last_save_is_told_at_the_end(
    config: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(destination: Path, *_: object, **__: object) -> None:
        raise ConsiliumError(f"cannot save to {destination}: no space left on the disk.")

    monkeypatch.setattr(store, "commit_folder", fail)
    with pytest.raises(ConsiliumError, match="step-8: no space left"):
        train(dataclasses.replace(config, save_every=100), tmp_path / "run")


def test_an_end_of_any_kind_waits_for_what_is_being_written(
    config: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the lock another process may sweep the folder."""
    save = store.save

    def slow(*arguments: object, **options: object) -> None:
        threading.Event().wait(0.5)
        save(*arguments, **options)

    monkeypatch.setattr(store, "save", slow)
    config = dataclasses.replace(config, save_every=2)
    with pytest.raises(Killed):
        train(config, tmp_path / "run", listeners=(killed_after(3),))
    with locked(tmp_path / "run", print):
        assert atomic.latest(tmp_path / "run/checkpoints").name == "step-2"
        assert not [path for path in (tmp_path / "run/checkpoints").iterdir() if ".tmp-" in path.name]


@pytest.mark.parametrize("saving", ["blocking", "background"])
def test_a_saver_tells_each_end_once(saving: str, tmp_path: Path) -> None:
    saver = Saver(saving)
    saver.begin(Written(1, tmp_path), lambda: None)
    assert saver.finished(wait=True) == Written(1, tmp_path)
    assert saver.finished(wait=True) is None

    def fail() -> None:
        raise OSError(errno.EIO, "input/output error")

    saver.begin(Written(2, tmp_path), fail)
    with pytest.raises(OSError, match="input/output"):
        saver.finished(wait=True)
    assert saver.finished(wait=True) is None
    saver.close()


def test_the_copy_and_the_average_are_in_the_memory_that_a_run_needs(config: Training) -> None:
    plain = run_memory(dataclasses.replace(config, saving="blocking"))
    behind = run_memory(config)
    assert behind.copy == plain.checkpoint == plain.weights + plain.optimizer + plain.average
    assert plain.average == plain.gradients
    assert behind.total == plain.total + plain.checkpoint


@pytest.mark.parametrize("saving", ["blocking", "background"])
@pytest.mark.parametrize("step", [1, 2])
def test_a_checkpoint_is_told_once(config: Training, saving: str, step: int, tmp_path: Path) -> None:
    """Also where the stop finds that the step has just been saved."""
    config = dataclasses.replace(config, saving=saving, save_every=1, steps=3)
    seen: list[Event] = []

    def stop() -> bool:
        return any(isinstance(event, Stepped) and event.step == step for event in seen)

    train(config, tmp_path / "run", listeners=(seen.append,), stop=stop)
    assert [event.step for event in seen if isinstance(event, Saved)] == list(range(1, step + 1))
