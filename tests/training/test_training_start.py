"""A run may begin with somebody's weights and tokenizer, and leave parts of them as they are."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import growth
import pytest
import torch

from consilium.checkpoint import store
from consilium.cli.main import main
from consilium.config import io
from consilium.config.balance import Balance, ImportanceLoss, SwitchLoss
from consilium.config.data import Data, TextPath
from consilium.config.router import NoGate, Uniform
from consilium.config.training import Bytes, Folder, Training
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError
from consilium.model.decoder import Decoder
from consilium.parallel.mesh import Mesh
from consilium.parallel.topology import Topology
from consilium.training.events import Event, Notice
from consilium.training.freeze import freeze, is_frozen
from consilium.training.loop import train
from processes import together
from small import DEEPSEEK, lively
from support import relative_error


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("".join(f"line {i} of many.\n" for i in range(400)))
    return path


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs") / "their model"
    store.save(lively(DEEPSEEK), folder, tokenizer=Tokenizer.of_bytes())
    return folder


def configuration(text: Path, theirs: Path, **changes: object) -> Training:
    start = Folder(path=str(theirs))
    data = Data(sources=(TextPath(path=str(text)),), sequence_length=24)
    config = Training(
        model=DEEPSEEK, init=start, tokenizer=start, data=data, steps=2, batch=2, eval_tokens=64
    )
    return dataclasses.replace(config, **changes)


def weights(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_a_run_begins_with_the_weights_of_a_folder_and_a_fresh_optimizer(
    text: Path, theirs: Path, tmp_path: Path
) -> None:
    tiny = dataclasses.replace(Training(model=DEEPSEEK, steps=1).optimizer, learning_rate=1e-12)
    finished = train(configuration(text, theirs, optimizer=tiny, steps=1), tmp_path / "run")
    before, after = weights(store.load(theirs)), weights(store.load(finished.checkpoint))
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    state = store.load_training_state(finished.checkpoint).tensors
    assert {float(value) for name, value in state.items() if name.endswith(":step")} == {1.0}


def test_what_it_began_with_is_part_of_a_run(text: Path, theirs: Path, tmp_path: Path) -> None:
    config = configuration(text, theirs)
    train(config, tmp_path / "run")
    stored = io.read_yaml(Training, tmp_path / "run/config.yaml")
    assert isinstance(stored.init, Folder)
    assert isinstance(stored.tokenizer, Folder)
    assert stored.init.sha256 != stored.tokenizer.sha256
    assert train(config, tmp_path / "run", resume=True).steps == 2  # the digests are filled in
    other = dataclasses.replace(stored.init, sha256="0" * 64)
    with pytest.raises(ConsiliumError, match="has another weights than when this configuration was made"):
        train(dataclasses.replace(stored, init=other), tmp_path / "again")
    elsewhere = Folder(path=str(theirs.parent))
    with pytest.raises(ConsiliumError, match=r"started with init\.path = .*, and its weights have begun"):
        train(dataclasses.replace(stored, init=elsewhere), tmp_path / "run", resume=True)


def test_a_vocabulary_that_differs_is_refused_with_the_two_numbers(
    text: Path, theirs: Path, tmp_path: Path
) -> None:
    larger = dataclasses.replace(DEEPSEEK, vocab_size=DEEPSEEK.vocab_size + 5)
    with pytest.raises(ConsiliumError, match=rf"{DEEPSEEK.vocab_size} tokens and the model one of"):
        train(configuration(text, theirs, model=larger, tokenizer=Bytes()), tmp_path / "run")
    smaller = dataclasses.replace(DEEPSEEK, vocab_size=258)
    with pytest.raises(ConsiliumError, match=r"has 259 tokens or more and the model's vocabulary is 258"):
        train(configuration(text, theirs, model=smaller), tmp_path / "run")


def test_a_model_of_other_settings_takes_the_weights_that_fit(
    text: Path, theirs: Path, tmp_path: Path
) -> None:
    assert DEEPSEEK.moe is not None
    balance = Balance(losses=(SwitchLoss(),), bias=DEEPSEEK.moe.balance.bias)
    other = dataclasses.replace(DEEPSEEK, moe=dataclasses.replace(DEEPSEEK.moe, balance=balance))
    assert train(configuration(text, theirs, model=other, steps=1), tmp_path / "run").steps == 1
    deeper = dataclasses.replace(DEEPSEEK, layers=DEEPSEEK.layers + 2)
    with pytest.raises(ConsiliumError, match="has no weight"):
        train(configuration(text, theirs, model=deeper), tmp_path / "other")


def test_weights_without_a_place_in_the_model_are_told(text: Path, theirs: Path, tmp_path: Path) -> None:
    """Fewer blocks, a tied head or another rule of choice take part of a model, which nobody may miss."""
    shorter = dataclasses.replace(
        DEEPSEEK, layers=2, mtp=dataclasses.replace(DEEPSEEK.mtp, depth=0), tied=True
    )
    told: list[Event] = []
    train(configuration(text, theirs, model=shorter, steps=1), tmp_path / "run", listeners=(told.append,))
    kept = store.load(theirs).state_dict().keys() & store.load(tmp_path / "run").state_dict().keys()
    left = len(store.load(theirs).state_dict()) - len(kept)
    said = [event.text for event in told if isinstance(event, Notice)]
    assert (
        f"{left} tensors of {theirs} have no place in the model and are left out, such as layers.2."
        in "".join(said)
    )
    told.clear()
    train(configuration(text, theirs, steps=1), tmp_path / "same", listeners=(told.append,))
    assert not any("no place" in event.text for event in told if isinstance(event, Notice))


def test_gates_alone_train_where_all_else_is_frozen(text: Path, theirs: Path, tmp_path: Path) -> None:
    config = configuration(text, theirs, freeze=("*", "!*.router.*"))
    finished = train(config, tmp_path / "run")
    before, after = store.load(theirs), store.load(finished.checkpoint)
    moved = {name for name, value in weights(before).items() if not value.equal(weights(after)[name])}
    assert moved
    assert all(".router." in name for name in moved)
    for layer, moe in before.moe_modules().items():
        bias_E, same_E = moe.balance.bias_E, after.moe_modules()[layer].balance.bias_E
        assert bias_E is not None
        assert bias_E.equal(same_E), "a frozen bias chooses as it did"
    saved = store.load_training_state(finished.checkpoint).tensors
    assert saved
    assert all(".router." in name for name in saved if ":" in name)
    longer = dataclasses.replace(config, steps=3)
    assert train(longer, tmp_path / "run", resume=True).steps == 3


def test_a_pattern_that_fits_nothing_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConsiliumError, match=r"no weight is called 'embed.weigth'.*embed\.weight"):
        freeze(lively(DEEPSEEK), ("embed.weigth",))
    with pytest.raises(ConsiliumError, match="leaves nothing to train"):
        freeze(lively(DEEPSEEK), ("*",))


def test_the_last_pattern_that_fits_decides() -> None:
    patterns = ("*", "!layers.1.*", "layers.1.moe.*")
    names = ("embed.weight", "layers.1.norm.weight", "layers.1.moe.router.weight")
    assert [is_frozen(name, patterns) for name in names] == [True, False, True]
    assert not is_frozen("embed.weight", ())


def test_a_gate_that_no_loss_reaches_is_refused() -> None:
    assert DEEPSEEK.moe is not None

    def with_gate(*losses: object, **router: object) -> Training:
        inner = dataclasses.replace(DEEPSEEK.moe.router, weight=Uniform(), **router)
        balance = Balance(losses=losses, bias=DEEPSEEK.moe.balance.bias)
        moe = dataclasses.replace(DEEPSEEK.moe, router=inner, balance=balance)
        return Training(model=dataclasses.replace(DEEPSEEK, moe=moe), steps=1)

    for losses in ((), (ImportanceLoss(),), (SwitchLoss(coefficient=0.0),)):
        with pytest.raises(ConsiliumError, match="no loss reaches the gate"):
            with_gate(*losses)
    assert with_gate(SwitchLoss()).steps == 1
    assert isinstance(NoGate().kind, str)


def test_the_command_begins_with_a_folder_and_goes_on_when_it_is_gone(
    text: Path, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "mine"
    theirs_copy = store.load(theirs)
    store.save(theirs_copy, moved, tokenizer=Tokenizer.of_bytes())
    words = ["--out", str(tmp_path / "run"), "--data", str(text), "--seq", "24", "--batch", "2"]
    words += ["--set", "eval_tokens=64", "--set", "train.freeze=embed.*", "--threads", "1"]
    assert main(["train", str(moved), *words, "--steps", "1"]) == 0
    stored = io.read_yaml(Training, tmp_path / "run/config.yaml")
    assert stored.freeze == ("embed.*",)
    assert stored.init == dataclasses.replace(stored.init, kind="folder")
    assert main(["train", str(moved), "--out", str(tmp_path / "run"), "--resume", "--steps", "2"]) == 0
    assert (
        main(["train", str(tmp_path / "run"), "--out", str(tmp_path / "next"), *words[2:], "--steps", "1"])
        == 0
    )
    capsys.readouterr()
    assert main(["train", str(theirs), "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "its weights have begun already" in capsys.readouterr().err
    assert main(["train", str(theirs), *words, "--steps", "1", "--params", "1M"]) == 2


@pytest.mark.parametrize("suffix", ["", ".gguf"], ids=["folder", "gguf"])
def test_several_processes_begin_with_the_same_weights_each_with_its_own_part(
    suffix: str, text: Path, theirs: Path, tmp_path: Path
) -> None:
    start = Folder(path=f"{theirs}{suffix}")
    if suffix:
        assert main(["convert", str(theirs), start.path, "--to", "gguf"]) == 0
    mtp = dataclasses.replace(DEEPSEEK.mtp, depth=0)
    changes = {"init": start, "tokenizer": Bytes(), "model": dataclasses.replace(DEEPSEEK, mtp=mtp)}
    config = configuration(text, theirs, steps=1, accumulate=2, **changes)
    alone = train(config, tmp_path / "alone")

    def work(mesh: Mesh) -> dict[str, torch.Tensor]:
        train(config, tmp_path / "two", mesh=mesh)
        return {}

    together(Topology(expert=2), work)
    inits = [io.read_yaml(Training, tmp_path / name / "config.yaml").init for name in ("alone", "two")]
    assert inits[0] == inits[1], "the digest is of all the weights"
    one, two = weights(store.load(alone.checkpoint)), weights(store.load(tmp_path / "two"))
    assert all(relative_error(two[name], one[name]) < 1e-5 for name in one)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is read as Linux with glibc tells it")
def test_a_process_holds_no_expert_of_another_at_any_time(tmp_path: Path) -> None:
    """Nearly all of the weights are experts: half, and less than two tensors of them beside it."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),  # what is freed is given back
    }
    command = [sys.executable, str(Path(growth.__file__)), str(tmp_path / "large")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    whole, most = found["whole"], found["whole"] / 2 + found["largest"]
    for name in ("drawn by two", "read by two"):
        assert 0.4 * whole < found["growth"][name] < most, (name, found)
    assert found["growth"]["drawn by one"] > 0.9 * whole, "the measure sees what a process holds"


def test_a_resumed_run_saves_the_ends_and_sampling_of_what_it_began_with(
    text: Path, theirs: Path, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    shutil.copytree(theirs, started)
    (started / "generation_config.json").write_text('{"eos_token_id": [256, 7], "temperature": 0.5}')
    config = configuration(text, started, steps=2)
    train(config, tmp_path / "run", stop=iter([False, True]).__next__)
    assert store.load(train(config, tmp_path / "run", resume=True).checkpoint).generation == (
        store.load(started).generation
    )
