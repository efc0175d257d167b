"""Whatever standard output is - another encoding, full, closed, or left by its reader - nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import write_config, write_text

COMMAND = [sys.executable, "-m", "consilium"]
FULL = Path("/dev/full")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_of_another_encoding_shows_what_it_can(encoding: str) -> None:
    done = subprocess.run(
        [*COMMAND, "systems", "deepseek-v3"],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode(encoding)
    assert "deepseek-v3" in shown
    assert "f_i P_i" in shown
    assert "?_i f_i P_i" in shown  # a capital sigma


@pytest.mark.skipif(not FULL.exists(), reason="no device here that is always full")
@pytest.mark.parametrize("words", [["systems"], ["train", "--help"]])
def test_a_full_output_is_one_sentence(words: list[str]) -> None:
    with FULL.open("w") as full:
        done = subprocess.run([*COMMAND, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no space left for standard output")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ["systems", "--version"])
def test_a_closed_output_is_no_error(verb: str) -> None:
    shell = f"exec {sys.executable} -m consilium {verb} >&-"
    done = subprocess.run(["sh", "-c", shell], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_training_goes_on_when_its_reader_leaves(tmp_path: Path) -> None:
    config = write_config(tmp_path, write_text(tmp_path / "text"), steps=12)
    words = [*COMMAND, "train", str(config), "--out", str(tmp_path / "run"), "--eval-every", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
    assert (tmp_path / "run/checkpoints/step-12/manifest.json").exists()
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.skipif(not FULL.exists(), reason="no device here that is always full")
def test_a_training_ends_whole_when_its_output_is_full(tmp_path: Path) -> None:
    config = write_config(tmp_path, write_text(tmp_path / "text"))
    words = [*COMMAND, "train", str(config), "--out", str(tmp_path / "run")]
    with FULL.open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run/checkpoints/step-3/manifest.json").exists()
    assert (tmp_path / "run/report.html").exists()
