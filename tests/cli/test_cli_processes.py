"""``consilium train`` over several processes, by its own launcher and by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import write_config, write_text

from consilium.checkpoint import store
from consilium.cli.main import main

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def command(*words: str, launcher: tuple[str, ...] = (), **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, "-m", "consilium", *words],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "CONSILIUM_TIMEOUT": "60", **more},
        check=False,
    )


@pytest.mark.parametrize(
    "ways",
    [("--ep", "2", "--set", "overlap=true", "--batch", "4"), ("--replicas", "2", "--batch", "4")],
    ids=str,
)
def test_every_way_to_share_a_step_trains_what_one_process_does(
    ways: tuple[str, ...], text: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, text)
    losses: dict[str, list[float]] = {}
    for name, words in {"one": ("--batch", "4"), "two": ("--nproc", "2", *ways)}.items():
        done = command("train", str(config), "--out", str(tmp_path / name), *words, "--json")
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses["one"]) == 3
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-5)


def test_two_processes_train_one_run_and_one_of_them_tells_it(text: Path, tmp_path: Path) -> None:
    config, out = write_config(tmp_path, text), tmp_path / "run"
    done = command("train", str(config), "--out", str(out), "--nproc", "2", "--ep", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3
    assert done.stderr.count("step     0  held-out bits per byte") == 1
    assert (out / "report.html").exists()
    assert store.load(out).config.moe is not None
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3]
    # One process goes on with what two began, by the file that they began with.
    again = command("train", str(config), "--out", str(out), "--resume", "--steps", "4")
    assert again.returncode == 0, again.stderr


def test_a_launcher_of_one_process_trains_as_without_it(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing listens at this port: one process has nobody to meet."""
    config = write_config(tmp_path, text)
    words = ["--set", "optimizer.kind=muon", "--set", "saving=background"]
    for name in ("plain", "launched"):
        if name == "launched":
            given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
            for key, value in given.items():
                monkeypatch.setenv(key, value)
        assert main(["train", str(config), "--out", str(tmp_path / name), *words]) == 0
    plain, launched = (store.load(tmp_path / name).state_dict() for name in ("plain", "launched"))
    assert all(torch.equal(plain[name], launched[name]) for name in plain)
    for wrong, sentence in (
        ("--nproc", "launcher started 1; leave"),
        ("--ep", "1 processes cannot be dealt"),
    ):
        capsys.readouterr()
        assert main(["train", str(config), "--out", str(tmp_path / "other"), wrong, "2"]) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--nproc", "3", "--ep", "2"], "3 processes cannot be dealt into groups of 2 that share experts"),
        (
            ["--nproc", "2", "--set", "batch=3"],
            "--batch 3 cannot be dealt into 2 micro-batches over 2 processes",
        ),
        (["--nproc", "0"], "'0' is not a number of processes from 1 to 4096"),
        (
            ["--nproc", "4", "--ep", "2", "--replicas", "3"],
            "in each of 3 replicas; choose --ep and --replicas",
        ),
        (["--nproc", "2", "--set", "overlap=true"], "overlap hides how rows travel to experts elsewhere"),
        (["--ep", "2"], "1 processes cannot be dealt into groups of 2"),
        (["--replicas", "2"], "1 processes cannot be dealt into groups of 1 that share experts in each of 2"),
        (
            ["--nproc", "2", "--set", "optimizer.state.kind=int8"],
            "optimizer.state.kind int8 runs in one process",
        ),
        (["--nproc", "2", "--set", "saving=background"], "saving background runs in one process"),
    ],
)
def test_a_mistake_is_told_once(words: list[str], sentence: str, text: Path, tmp_path: Path) -> None:
    done = command("train", str(write_config(tmp_path, text)), "--out", str(tmp_path / "run"), *words)
    assert done.returncode == 2
    assert done.stderr.count(sentence) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_trains_and_starts_anew_from_the_newest_checkpoint(text: Path, tmp_path: Path) -> None:
    """The first try dies after a checkpoint; torchrun starts both processes again, which go on."""
    config, out = write_config(tmp_path, text, steps=6), tmp_path / "run"
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1' and os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0':\n"
        "    import threading, time, pathlib\n"
        f"    made = pathlib.Path({str(out / 'checkpoints' / 'step-2')!r})\n"
        "    def die():\n"
        "        while not made.exists():\n"
        "            time.sleep(0.01)\n"
        "        os._exit(7)\n"
        "    threading.Thread(target=die, daemon=True).start()\n"
    )
    path = os.pathsep.join((str(site), os.environ.get("PYTHONPATH", "")))
    launcher = (*TORCHRUN, "--max-restarts", "2")
    words = ["train", str(config), "--out", str(out), "--save-every", "2", "--ep", "2"]
    done = command(*words, launcher=launcher, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "done: 6 steps" in done.stdout
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
