"""The commands of the pages on upcycling, as they stand there but for shorter runs on less text."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from consilium.cli.main import main
from house.test_house_docs import commands
from house.tree import ROOT
from upcycling.sources import LLAMA, fine_tuned, saved

LENGTH = re.compile(r"--(minutes|steps) \d+")


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pages take for granted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "cache"))
    Path("texts").mkdir()
    for i in range(4):
        lines = [f"{n * n + i} is the square of {n}, said {chr(97 + n % 26)}{n % 7}.\n" for n in range(200)]
        Path(f"texts/{i}.txt").write_text("".join(lines))
    saved(LLAMA, Path("BASE"))
    for seed, name in enumerate(("code", "math", "chat")):
        fine_tuned(LLAMA, Path(name), seed)


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize(("page", "count"), [("upcycle", 10), ("mla", 4)])
def test_the_commands_of_the_page_run(page: str, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = commands(ROOT / f"docs/how-to/{page}.md")
    assert len(found) == count
    for command in found:
        words = shlex.split(LENGTH.sub("--steps 1 --batch 2 --seq 64", command), comments=True)[1:]
        data = ["--data", "texts"] if words[0] in {"train", "upcycle"} and "--data" not in words else []
        assert main([*words, *data]) == 0, (command, capsys.readouterr().err)
