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
from typing import Any, final

import torch

from consilium.benchmarking.record import record
from consilium.errors import ConsiliumError, nearest
from consilium.machine.processors import cpu_name
from consilium.records.bench import BenchRecord, Figure
from consilium.records.io import read_json, write_json

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
    prepare: Callable[[Settings], Measure]
    """Is called once, before processes are forked."""

    def path_of(self, name: str, settings: Settings) -> Path:
        return settings.records / f"{self.script}-{name}.json"

    def command_of(self, name: str, settings: Settings) -> str:
        return f"python bench/{self.script}.py {name} {settings.command}"

    def is_done(self, name: str, settings: Settings) -> bool:
        """Whether there is a record of these settings and this processor, whatever the commit."""
        path = self.path_of(name, settings)
        if not path.exists():
            return False
        found = read_json(BenchRecord, path)
        return found.command == self.command_of(name, settings) and found.machine.startswith(cpu_name())

    def measure(self, name: str, settings: Settings, measure: Measure) -> None:
        begun = time.monotonic()
        found = tuple(measure(name, settings))
        made = record(f"{self.script}-{name}", self.command_of(name, settings), found)
        write_json(self.path_of(name, settings), made)
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)


def work(study: Study, waiting: Any, measure: Measure, settings: Settings) -> None:
    """Take names from the queue until there is none."""
    torch.set_num_threads(1)
    while (name := waiting.get()) is not None:
        study.measure(name, settings, measure)


def run(study: Study, chosen: Sequence[str], jobs: int, settings: Settings) -> int:
    """Processes are forked with what was prepared in memory, before this one has trained anything."""
    torch.set_num_threads(1)
    measure = study.prepare(settings)
    context = multiprocessing.get_context("fork")
    waiting = context.SimpleQueue()
    for name in (*chosen, *[None] * jobs):
        waiting.put(name)
    workers = [context.Process(target=work, args=(study, waiting, measure, settings)) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(abs(worker.exitcode or 0) for worker in workers)


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
