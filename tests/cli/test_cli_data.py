"""The commands of the page on data, as they stand there but for shorter runs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from consilium.cli.main import main
from consilium.records.metrics import read_metrics
from house.test_house_docs import commands
from house.tree import ROOT

PAGE = ROOT / "docs/how-to/data.md"


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "cache"))
    line = "The council of the town decided in March to repair the bridge, and it took a year.\n"
    for name, content in (
        ("notes/{i}.txt", line * 30),
        ("src/{i}.py", "def area(w, h):\n    return w * h\n" * 40),
    ):
        for i in range(8):
            path = Path(name.format(i=i))
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{i}: {content}")
    said = [{"role": "user", "content": "How much is 1 + 1?"}, {"role": "assistant", "content": "It is 2."}]
    record = json.dumps({"messages": said * 4})
    Path("talks.jsonl").write_text(f"{record}\n" * 30)


@pytest.mark.usefixtures("texts")
def test_the_commands_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = commands(PAGE)
    assert len(found) == 6
    for command in found:
        words = shlex.split(command.replace("--steps 20", "--steps 7 --batch 2 --seq 32 --params 200k"))
        assert main(words[1:]) == 0, capsys.readouterr().err
    shares = [record.shares for record in read_metrics(Path("runs/dynamic/metrics.jsonl")).records]
    assert [set(one) for one in shares if one] == [{"prose", "code"}]


@pytest.mark.usefixtures("texts")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "notes:half"], "'half' is no weight; write [NAME=]PATH[:WEIGHT]"),
        (["--data", "notes:0.5", "--data", "talks.jsonl:0"], "a weight is above 0"),
        (["--data", "nots:0.5"], "data: nots does not exist"),
    ],
)
def test_a_source_that_is_spelled_wrong_is_told(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "deepseek-v3:tiny", "--steps", "1", "--out", "run", *words]) == 2
    assert said in capsys.readouterr().err
