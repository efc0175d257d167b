"""Run the tests behind every promise, large counts included, and keep what came out as records.

usage: python bench/promises.py [RECORD ...] [--out FOLDER] [-- PYTEST OPTION ...]

A test is one trial, unless it reports more with ``record_property("trials", n)`` and
``record_property("failures", m)``; what is skipped was not tried, and what never called the package
(trials.py sees it) tried something else. Without names all promises are run, and
after them the large-count tests that stand behind none. With options for pytest nothing is recorded: a
choice of tests is not the promise.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from consilium.benchmarking.record import once, record
from consilium.errors import ConsiliumError, nearest
from consilium.records.io import read_json, write_json
from consilium.records.promise import Promise, Promises

ROOT = Path(__file__).parents[1]
HOURS = 2
FOUND_A_FAILURE, FOUND_NO_TEST = 1, 5


@dataclass(frozen=True, slots=True)
class Count:
    trials: int = 0
    failures: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.trials + other.trials, self.failures + other.failures)


def main(arguments: Sequence[str]) -> int:
    words, options = split(arguments)
    chosen = parse(words)
    promises = read_json(Promises, ROOT / "bench" / "promises.json").promises
    failures = 0
    for promise in pick(promises, chosen.names):
        count = run(promise.tests, options)
        failures += count.failures
        print(f"{promise.record}: {count.trials:,} trials, {count.failures:,} failures", flush=True)
        if not options:
            keep(promise, count, chosen.out)
    behind_none = 0 if chosen.names else run_rest(promises, options)
    return 1 if failures or behind_none else 0


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments before and after ``--``."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="RECORD")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "records", metavar="FOLDER")
    return parser.parse_args(words)


def pick(promises: Sequence[Promise], names: Sequence[str]) -> list[Promise]:
    by_name = {promise.record: promise for promise in promises}
    for name in names:
        if name not in by_name:
            raise ConsiliumError(f"unknown promise {name!r}.{nearest(name, by_name)}")
    return [by_name[name] for name in names] if names else list(promises)


def run(tests: Iterable[str], options: Sequence[str]) -> Count:
    """Count the trials and failures of ``tests``. Raises when pytest could not run them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = pytest("-p", "trials", "-m", "not gpu", f"--junit-xml={report}", *tests, *options)
        if code not in {0, FOUND_A_FAILURE, FOUND_NO_TEST}:
            raise RuntimeError(f"pytest ended with exit code {code}")
        return counted(report)


def run_rest(promises: Iterable[Promise], options: Sequence[str]) -> bool:
    """Run the large-count tests behind no promise; return whether one failed."""
    others = {test for promise in promises for test in promise.tests}
    code = pytest("-m", "slow", "tests", *(f"--ignore={test}" for test in sorted(others)), *options)
    return code not in {0, FOUND_NO_TEST}


def pytest(*options: str) -> int:
    command = [sys.executable, "-m", "pytest", "--quiet", "--timeout", str(HOURS * 3600), *options]
    plugins = os.pathsep.join([str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        command, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": plugins}
    ).returncode


def counted(report: Path) -> Count:
    """Sum the trials and failures of a report in JUnit's format."""
    cases = ET.parse(report).iter("testcase")  # noqa: S314 - pytest wrote it a moment ago
    return sum((of_test(case) for case in cases), Count())


def of_test(case: ET.Element) -> Count:
    """A failed test has failed at least once, whatever it reported before."""
    if case.find("skipped") is not None:
        return Count()
    told = {item.get("name"): item.get("value") for item in case.iter("property")}
    failed = case.find("failure") is not None or case.find("error") is not None
    if told.get("touched") == "no" and not failed:
        return Count()
    return Count(int(told.get("trials") or 1), max(int(told.get("failures") or 0), failed))


def keep(promise: Promise, count: Count, folder: Path) -> None:
    figures = once("trials", "", count.trials), once("failures", "", count.failures)
    command = f"python bench/promises.py {promise.record}"
    write_json(folder / f"{promise.record}.json", record(promise.record, command, figures))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConsiliumError as error:
        sys.exit(f"error: {error}")
