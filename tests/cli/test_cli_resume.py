"""A run goes on from its own configuration: what an option does not say, the run says."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import write_config, write_text

from consilium.cli.exits import command_line
from consilium.cli.main import main
from consilium.training.files import CONFIG_FILE

MODEL = "deepseek-v3:tiny"
SMALL = ["--params", "200k", "--set", "model.layers=2", "--set", "tokenizer.kind=bytes"]
OPTIONS = [*SMALL, "--batch", "2", "--seq", "24", "--lr", "0.001", "--balance", "switch", "--seed", "3"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def run(tmp_path: Path, text: Path) -> Path:
    out = tmp_path / "run"
    words = ["--data", str(text), "--steps", "2", "--set", "eval_tokens=64"]
    assert main(["train", MODEL, "--out", str(out), *OPTIONS, *words]) == 0
    return out


def resumed(run: Path, *words: str, model: str = MODEL) -> int:
    return main(["train", model, "--out", str(run), "--resume", *words])


def test_no_option_is_wanted_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / CONFIG_FILE).read_text()
    assert resumed(run) == 0
    assert resumed(run, model=str(run / CONFIG_FILE)) == 0
    assert resumed(run, "--batch", "2", "--lr", "0.001", "--balance", "switch", "--minutes", "3") == 0
    assert (run / CONFIG_FILE).read_text() == before
    said = capsys.readouterr().out
    assert "calibrated" not in said
    assert "asked for" not in said  # steps were, and no minutes


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--steps", "1"], "it has run 2 steps, more than the 1 asked for"),
        (["--seq", "16"], "started with data.sequence_length = 24, not 16, and what it has read"),
        (["--balance", "none"], "started with model.moe.balance"),
        (["--set", "optimizer.decay=0.5"], "started with optimizer.decay = 0.1, not 0.5"),
        (["--params", "300k"], "started with model."),
    ],
)
def test_another_setting_is_refused(
    words: list[str], answer: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resumed(run, *words) == 2
    assert answer in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("mixtral:tiny", "mixtral:tiny"),
        ("deepseek-v3:1b", "deepseek-v3:1b"),
        ("deepseek-v3", "deepseek-v3:671b"),
    ],
)
def test_another_recipe_or_size_is_refused(
    model: str, named: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resumed(run, model=model) == 2
    assert f"it trains deepseek-v3:tiny, not {named}" in capsys.readouterr().err


def test_a_file_that_says_otherwise_is_refused_with_the_way_to_go_on(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run.parent / "other.yaml"
    other.write_text((run / CONFIG_FILE).read_text().replace("learning_rate: 0.001", "learning_rate: 0.002"))
    assert resumed(run, model=str(other)) == 2
    said = capsys.readouterr().err
    assert "started with optimizer.learning_rate = 0.001, not 0.002" in said
    words = said[said.index("consilium train") :].split(" goes on")[0].split()[1:]
    assert main(words) == 0


def test_the_dtype_is_measured_when_a_run_begins_and_not_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilium.cli.configure.faster_dtype", lambda _: "bfloat16")
    assert resumed(run, "--dtype", "auto") == 0


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_says_how_to_go_on_and_that_works(
    number: signal.Signals, tmp_path: Path, text: Path
) -> None:
    """Stopped in the middle by a burst of three signals; the command it prints goes on from there.

    The run is longer than it could be done in before it is stopped, and the rest is cut off by ``--steps``.
    """
    out = tmp_path / "run"
    config = write_config(tmp_path, text, steps=100_000)
    command = [sys.executable, "-m", "consilium"]
    with subprocess.Popen(
        [*command, "train", str(config), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        metrics = out / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        for _ in range(3):
            os.kill(process.pid, number)
            time.sleep(0.1)
        printed, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "stopping: the step in progress ends and is saved" in errors
    assert (out / "report.html").exists()
    line = next(line.strip() for line in printed.splitlines() if line.endswith("--resume"))
    assert line == command_line("train", out / CONFIG_FILE, "--out", out, "--resume")
    (stopped,) = (int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir())
    words = shlex.split(line)
    assert main([*words[words.index("train") :], "--steps", str(stopped + 2)]) == 0
    assert (out / f"checkpoints/step-{stopped + 2}").exists()
