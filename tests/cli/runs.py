"""A run folder made by the command itself, small enough for a test."""

from __future__ import annotations

from pathlib import Path

from consilium.config import io
from consilium.config.data import Data, TextPath
from consilium.config.training import Bytes, Training
from small import DEEPSEEK


def write_text(folder: Path) -> Path:
    """Two domains of six files."""
    for name in ("notes", "code"):
        for i in range(6):
            path = folder / name / f"{i}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{name} line {i * j} of {j}.\n" for j in range(30)))
    return folder


def write_config(folder: Path, text: Path, steps: int = 3) -> Path:
    """The configuration of a run of a second, as the YAML that ``consilium train`` takes."""
    data = Data(sources=(TextPath(path=str(text)),), sequence_length=24)
    config = Training(model=DEEPSEEK, tokenizer=Bytes(), data=data, steps=steps, batch=2, eval_tokens=64)
    path = folder / "small.yaml"
    path.write_text(io.to_yaml(config))
    return path
