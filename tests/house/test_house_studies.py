"""bench/studies.py knows what is done: of these settings, and of the weights that runs begin with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from consilium.benchmarking.record import once
from consilium.records.bench import BenchRecord
from consilium.records.io import read_json, write_json
from house.scripts import loaded


@pytest.fixture(scope="module")
def studies() -> Iterator[ModuleType]:
    with loaded("bench/studies.py") as module:
        yield module


def test_a_record_of_other_weights_is_not_done(studies: ModuleType, tmp_path: Path) -> None:
    settings, there = studies.Settings(9, 2, tmp_path), {"seed 0": "a", "seed 1": "b"}
    study = studies.Study("x", ("one",), 9, lambda _, jobs: None, sources=lambda _: there)
    study.measure("one", settings, lambda name, _: studies.timed(0, [once("bits, seed 0", "", 1.0)]))
    record = read_json(BenchRecord, study.path_of("one", settings))
    assert record.sources == there
    assert [figure.name for figure in record.figures][1:] == ["seconds, seed 0", "processor seconds, seed 0"]
    assert study.is_done("one", settings, there)
    assert study.is_done("one", settings, {"seed 1": "b"}), "what is not there contradicts nothing"
    assert not study.is_done("one", settings, {"seed 1": "a"})
    assert not study.is_done("one", dataclasses.replace(settings, seeds=3), there)
    write_json(study.path_of("one", settings), dataclasses.replace(record, sources={}))
    assert study.is_done("one", settings)
    assert not study.is_done("one", settings, there), "it does not say what it began with"


def test_what_is_to_run_is_chosen_once_more_when_the_weights_are_there(
    studies: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known: dict[str, str] = {}

    def prepare(_: object, jobs: int) -> object:
        known["seed 0"] = "new"
        return lambda name, _: [once("bits, seed 0", "", 2.0)]

    study = studies.Study("x", ("one", "two"), 9, prepare, jobs=1, seeds=1, sources=lambda _: dict(known))
    settings = studies.Settings(9, 1, tmp_path)
    known["seed 0"] = "old"
    study.measure("one", settings, lambda name, _: [once("bits, seed 0", "", 1.0)])
    known.clear()
    words = [f"--records={tmp_path}"]
    assert studies.main(study, words, "about") == 0
    assert "2 to run" in capsys.readouterr().out, "one is of the old weights"
    assert read_json(BenchRecord, study.path_of("one", settings)).sources == {"seed 0": "new"}
    assert studies.main(study, words, "about") == 0
    assert "all is on record" in capsys.readouterr().out
