"""bench/run_all.py runs what has no record of this commit and machine, and goes on after a stop."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from consilium.benchmarking.record import once, record
from consilium.cli.bench import NAMES
from consilium.errors import ConsiliumError
from consilium.records.io import write_json
from house.scripts import loaded

WRITES = """
import sys
from pathlib import Path
from consilium.benchmarking.record import once, record
from consilium.records.io import write_json
write_json(Path(sys.argv[1]), record("x", "x", [once("speed", "", 1.0)]))
"""


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    def commands(folder: Path) -> dict[str, tuple[str, ...]]:
        good = {name: (sys.executable, "-c", WRITES, str(folder / f"{name}.json")) for name in ("a", "c")}
        return {"a": good["a"], "b": (sys.executable, "-c", "raise SystemExit(1)"), "c": good["c"]}

    with loaded("bench/run_all.py") as module:
        monkeypatch.setattr(module, "queue", commands)
        yield module


def test_what_failed_or_was_stopped_is_run_again_and_nothing_else(
    queue: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "a.json", record("a", "a", [once("speed", "", 1.0)]))
    assert queue.main(["--records", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "[1 of 3] a: on record for this commit" in said
    assert "[3 of 3] c ..." in said
    assert "failed: b" in said
    assert queue.main(["a", "c", "--records", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("on record for this commit") == 2


def test_a_record_of_another_commit_is_not_done(queue: ModuleType, tmp_path: Path) -> None:
    made = record("a", "a", [once("speed", "", 1.0)])
    write_json(tmp_path / "a.json", made)
    assert queue.is_done(tmp_path / "a.json")
    queue.commit = lambda: "another"
    assert not queue.is_done(tmp_path / "a.json")
    assert not queue.is_done(tmp_path / "none.json")


def test_records_of_another_kind_of_processor_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded("bench/run_all.py") as module:
        monkeypatch.setattr(module, "RECORDS", tmp_path)
        assert module.home() == tmp_path
        made = record(module.FIRST, "x", [once("speed", "", 1.0)])
        write_json(tmp_path / f"{module.FIRST}.json", made)
        assert module.home() == tmp_path
        write_json(tmp_path / f"{module.FIRST}.json", dataclasses.replace(made, machine="Another, 2 cores"))
        beside = module.home()
        assert beside.parent == tmp_path
        assert re.fullmatch(r"[a-z0-9-]+", beside.name)


def test_every_benchmark_of_the_command_is_in_the_queue(tmp_path: Path) -> None:
    with loaded("bench/run_all.py") as module:
        assert set(NAMES) <= set(module.queue(tmp_path))
        with pytest.raises(ConsiliumError, match="Did you mean 'jacobs'"):
            module.pick(["jacbos"], module.queue(tmp_path))
