"""A run starts in a folder of its own, one process at a time, and saves only what a resume can use."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import consilium as cs
from consilium.checkpoint import store
from consilium.cli.main import main
from consilium.config.data import Data, TextPath
from consilium.config.io import to_yaml
from consilium.config.training import Bytes, Training
from consilium.errors import ConsiliumError
from consilium.model.build import build
from consilium.training.events import Event, Stepped
from consilium.training.files import LOCK_FILE, locked
from consilium.training.guard import check_memory, check_weights
from consilium.training.loop import train
from small import DEEPSEEK, DENSE

HOLD = """
import sys, time
from pathlib import Path
from consilium.training.files import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Training:
    text = tmp_path_factory.mktemp("text") / "a.txt"
    text.write_text("".join(f"line {i} of many.\n" for i in range(400)))
    data = Data(sources=(TextPath(path=str(text)),), sequence_length=24)
    return Training(model=DENSE, tokenizer=Bytes(), data=data, steps=2, batch=2, eval_tokens=64)


def test_a_folder_with_a_model_is_left_as_it_is(config: Training, tmp_path: Path) -> None:
    store.save(build(DEEPSEEK), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    for resume in (False, True):
        with pytest.raises(ConsiliumError, match=r"holds files that are no run's \(config\.json"):
            train(config, tmp_path / "model", resume=resume)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_a_file_is_no_folder(config: Training, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConsiliumError, match="is a file; give the name"):
        train(config, tmp_path / "file")


def test_what_a_crash_left_before_the_first_step_is_no_obstacle(config: Training, tmp_path: Path) -> None:
    for name in ("meta.json", LOCK_FILE, ".config.yaml.17.tmp"):
        (tmp_path / name).write_text("")
    assert train(config, tmp_path).steps == 2


def test_two_processes_do_not_train_in_one_folder(
    config: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConsiliumError, match="in use by another process"):
            train(config, tmp_path / "run")
        # The command asks before it reads text and measures speed, for which --minutes would take seconds.
        (tmp_path / "run.yaml").write_text(to_yaml(config))
        words = ["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), "--minutes", "1"]
        monkeypatch.setattr("consilium.data.corpus.build_corpus", pytest.fail)
        assert main(words) == 2
        other.kill()
        other.wait()
    assert train(config, tmp_path / "run").steps == 2


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_made_for_nothing_goes_again_and_no_other(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "run").mkdir()
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "run", print):
        raise ZeroDivisionError
    assert (tmp_path / "run").exists() == there


def test_a_folder_that_vanishes_hides_no_error(tmp_path: Path) -> None:
    def vanish() -> None:
        with locked(tmp_path / "run", print):
            shutil.rmtree(tmp_path / "run")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        vanish()


def test_weights_that_are_not_finite_are_never_saved(config: Training, tmp_path: Path) -> None:
    """The guard of steps sees loss and gradients; what else spoils a weight is found before a save."""

    def spoil(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 2:
            torch.nn.init.constant_(model_of_run[0].norm.weight, torch.inf)

    model_of_run = [build(DENSE)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("consilium.training.start.drawn", lambda *_, **__: model_of_run[0])
        with pytest.raises(ConsiliumError, match=r"step 2: norm\.weight is no longer finite"):
            train(config, tmp_path / "run", listeners=(spoil,))
    assert not (tmp_path / "run/checkpoints").exists()
    check_weights(build(DENSE), 2)


def test_a_model_that_memory_cannot_hold_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilium.machine.memory.memory_limit", lambda: 2**36)
    large = Training(model=cs.recipe("deepseek-v3"), data=Data(sources=(TextPath(path="nowhere"),)), steps=1)
    with pytest.raises(ConsiliumError, match=r"training deepseek-v3 with 671,026,404,352 parameters needs"):
        train(large, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_memory(Training(model=DENSE, steps=1))


def test_a_run_loads_like_its_newest_checkpoint(config: Training, tmp_path: Path) -> None:
    finished = train(config, tmp_path / "run")
    run, checkpoint = cs.load(tmp_path / "run"), cs.load(finished.checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(run.parameters(), checkpoint.parameters(), strict=True))
