"""A queue of runs over the cores, each a record of its own: stopped at any time, it goes on where it was.

What bench/balance.py and bench/upcycle.py share.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, final

import torch

from consilium.benchmarking.record import record
from consilium.errors import ConsiliumError, nearest
from consilium.records.bench import BenchRecord, Figure
from consilium.records.io import read_json, write_json

_T = TypeVar("_T")
RECORDS = Path(__file__).parent / "records"


@dataclass(frozen=True, slots=True)
class Settings:
    """What every run of a study shares, and where its records go."""

    steps: int
    seeds: int
    records: Path

    @property
    def command(self) -> str:
        return f"--steps {self.steps} --seeds {self.seeds}"


Measure = Callable[[str, Settings], Iterable[Figure]]
"""Runs one name and returns what came of it."""


@final
@dataclass(frozen=True, slots=True)
class Study:
    """Runs called ``names``; their records are ``<script>-<name>.json``."""

    script: str
    names: tuple[str, ...]
    steps: int
    prepare: Callable[[Settings, int], Measure]
    """Is called once, before processes are forked, with the number of these."""

    def path_of(self, name: str, settings: Settings) -> Path:
        return settings.records / f"{self.script}-{name}.json"

    def command_of(self, name: str, settings: Settings) -> str:
        return f"python bench/{self.script}.py {name} {settings.command}"

    def is_done(self, name: str, settings: Settings) -> bool:
        """Whether there is a record of these settings, whatever the commit.

        Of any processor: no figure is a time, and how another one rounds is less than a seed is.
        """
        path = self.path_of(name, settings)
        return path.exists() and read_json(BenchRecord, path).command == self.command_of(name, settings)

    def measure(self, name: str, settings: Settings, measure: Measure) -> None:
        begun = time.monotonic()
        found = tuple(measure(name, settings))
        made = record(f"{self.script}-{name}", self.command_of(name, settings), found)
        write_json(self.path_of(name, settings), made)
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)


def beside(tasks: Sequence[_T], jobs: int, run: Callable[[_T], None]) -> int:
    """Run all in ``jobs`` forked processes of one thread each; the worst of their exit codes."""
    context = multiprocessing.get_context("fork")
    waiting = context.SimpleQueue()
    for task in (*tasks, *[None] * jobs):
        waiting.put(task)

    def work() -> None:
        torch.set_num_threads(1)
        while (task := waiting.get()) is not None:
            run(task)

    workers = [context.Process(target=work) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(abs(worker.exitcode or 0) for worker in workers)


def run(study: Study, chosen: Sequence[str], jobs: int, settings: Settings) -> int:
    """Processes are forked with what was prepared in memory, before this one has trained anything."""
    torch.set_num_threads(1)
    measure = study.prepare(settings, jobs)
    return beside(chosen, jobs, lambda name: study.measure(name, settings, measure))


def main(study: Study, arguments: Sequence[str], about: str) -> int:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--again", action="store_true", help="also what is done")
    for option, default in (("jobs", 2), ("steps", study.steps), ("seeds", 3)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    settings = Settings(options.steps, options.seeds, options.records)
    for name in options.names:
        if name not in study.names:
            raise ConsiliumError(f"unknown run {name!r}.{nearest(name, study.names)}")
    asked = options.names or study.names
    chosen = [n for n in asked if options.again or not study.is_done(n, settings)]
    print(f"{len(chosen)} of {len(asked)} to run", flush=True)
    return run(study, chosen, options.jobs, settings) if chosen else 0


def ended(study: Study, about: str) -> None:
    """Run the command line, and end the process with its code."""
    try:
        sys.exit(main(study, sys.argv[1:], about))
    except ConsiliumError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; run it again to go on")
