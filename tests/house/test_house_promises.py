"""bench/promises.py counts what tests tried and keeps it as records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from consilium.errors import ConsiliumError
from consilium.records.bench import BenchRecord
from consilium.records.io import read_json
from consilium.records.promise import Promise, Promises
from house.scripts import loaded
from house.tree import ROOT

TESTS = """
import pytest
from consilium.errors import closest

@pytest.fixture(autouse=True)
def _touch(request):
    if "bare" not in request.node.name:
        closest("one", ["one"])

def test_one(): pass

def test_bare_oracle(): pass

def test_bare_but_wrong(): assert False

def test_bare_process():
    import subprocess, sys
    subprocess.run([sys.executable, "-c", "pass"], check=True)

@pytest.mark.skip
def test_never(): raise AssertionError

@pytest.mark.parametrize("n", [1, 2])
def test_two(n): pass

def test_many(record_property):
    record_property("trials", 2000)
    record_property("failures", 3)

def test_wrong(record_property):
    record_property("trials", 10)
    raise AssertionError

@pytest.fixture
def broken(): raise ValueError

def test_never_begun(broken): pass
"""


@pytest.fixture(scope="module")
def promises() -> Iterator[ModuleType]:
    with loaded("bench/promises.py") as module:
        yield module


def test_trials_that_touch_the_package_and_failures_are_counted(promises: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "test_counted.py"
    file.write_text(TESTS, encoding="utf-8")
    count = promises.run([str(file)], ["-p", "no:randomly"])
    assert (count.trials, count.failures) == (1 + 2 + 1 + 2000 + 10 + 1 + 1, 3 + 1 + 1 + 1)


def test_tests_that_cannot_be_run_are_no_count(promises: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 4"):
        promises.run([str(tmp_path / "test_missing.py")], [])


def test_a_count_becomes_a_record(promises: ModuleType, tmp_path: Path) -> None:
    promise = Promise(record="promise-x", sentence="x", tests=("tests/x",))
    promises.keep(promise, promises.Count(50, 2), tmp_path)
    kept = read_json(BenchRecord, tmp_path / "promise-x.json")
    assert {figure.name: figure.median for figure in kept.figures} == {"trials": 50, "failures": 2}
    assert kept.command == "python bench/promises.py promise-x"


@pytest.mark.parametrize(
    ("arguments", "halves"),
    [
        ([], ([], [])),
        (["a", "--", "-k", "b"], (["a"], ["-k", "b"])),
        (["a"], (["a"], [])),
    ],
)
def test_options_of_pytest_come_last(
    promises: ModuleType, arguments: list[str], halves: tuple[list[str], list[str]]
) -> None:
    assert promises.split(arguments) == halves


def test_an_unknown_promise_gets_the_nearest_name(promises: ModuleType) -> None:
    known = read_json(Promises, ROOT / "bench/promises.json").promises
    with pytest.raises(ConsiliumError, match="Did you mean 'promise-greedy'"):
        promises.pick(known, ["promise-gredy"])


def test_every_promise_has_a_record_of_its_own() -> None:
    names = [promise.record for promise in read_json(Promises, ROOT / "bench/promises.json").promises]
    assert len(names) == len(set(names))
    assert all(name.startswith("promise-") for name in names)
