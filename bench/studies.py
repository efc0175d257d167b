"""A queue of runs over the cores, each a record of its own: stopped at any time, it goes on where it was.

What bench/balance.py, bench/upcycle.py and bench/real_upcycling.py share.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar, final

import torch

from consilium.benchmarking.record import once, record
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
Sources = Mapping[str, str]
"""SHA-256 by ``seed N``."""


NONE: Sources = MappingProxyType({})


def no_sources(_: Settings) -> Sources:
    return NONE


def timed(seed: int, found: Iterable[Figure]) -> Iterator[Figure]:
    """What was found of a seed, and then the seconds that it took: a pause counts for the clock alone."""
    clock, processor = time.monotonic(), time.process_time()
    yield from found
    yield once(f"seconds, seed {seed}", "s", time.monotonic() - clock)
    yield once(f"processor seconds, seed {seed}", "s", time.process_time() - processor)


@final
@dataclass(frozen=True, slots=True)
class Study:
    """Runs called ``names``; their records are ``<script>-<name>.json``."""

    script: str
    names: tuple[str, ...]
    steps: int
    prepare: Callable[[Settings, int], Measure]
    """Is called once, before processes are forked, with the number of these."""
    jobs: int = 2
    seeds: int = 3
    sources: Callable[[Settings], Sources] = no_sources
    """The weights that runs begin with, as far as they are there by now."""

    def path_of(self, name: str, settings: Settings) -> Path:
        return settings.records / f"{self.script}-{name}.json"

    def command_of(self, name: str, settings: Settings) -> str:
        return f"python bench/{self.script}.py {name} {settings.command}"

    def is_done(self, name: str, settings: Settings, sources: Sources = NONE) -> bool:
        """Whether there is a record of these settings, and of these weights.

        Of any commit and processor: no figure that is compared is a time, and how another one rounds is less
        than a seed is.
        """
        path = self.path_of(name, settings)
        if not path.exists():
            return False
        found = read_json(BenchRecord, path)
        same = sources.items() <= found.sources.items()
        return same and found.command == self.command_of(name, settings)

    def measure(self, name: str, settings: Settings, measure: Measure) -> None:
        begun = time.monotonic()
        found = tuple(measure(name, settings))
        made = record(f"{self.script}-{name}", self.command_of(name, settings), found)
        write_json(self.path_of(name, settings), replace(made, sources=self.sources(settings)))
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


def run(study: Study, choose: Callable[[], Sequence[str]], jobs: int, settings: Settings) -> int:
    """Processes are forked with what was prepared in memory, before this one has trained anything.

    What is to run is chosen anew once it is known what runs begin with.
    """
    if not choose():
        print("all is on record", flush=True)
        return 0
    torch.set_num_threads(1)
    measure = study.prepare(settings, jobs)
    chosen = choose()
    print(f"{len(chosen)} to run", flush=True)
    return beside(chosen, jobs, lambda name: study.measure(name, settings, measure))


def main(study: Study, arguments: Sequence[str], about: str) -> int:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--again", action="store_true", help="also what is done")
    for option, default in (("jobs", study.jobs), ("steps", study.steps), ("seeds", study.seeds)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    settings = Settings(options.steps, options.seeds, options.records)
    for name in options.names:
        if name not in study.names:
            raise ConsiliumError(f"unknown run {name!r}.{nearest(name, study.names)}")
    asked = options.names or study.names

    def choose() -> list[str]:
        known = study.sources(settings)
        return [n for n in asked if options.again or not study.is_done(n, settings, known)]

    return run(study, choose, options.jobs, settings)


def ended(study: Study, about: str) -> None:
    """Run the command line, and end the process with its code."""
    try:
        sys.exit(main(study, sys.argv[1:], about))
    except ConsiliumError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; run it again to go on")
