"""Run the benchmarks one after the other and keep their records; what is on record for this commit is done.

usage: python bench/run_all.py [NAME ...] [--again]

Stop it at any time: it goes on with the first benchmark that has no record of this commit and machine. What
is on record of another kind of processor stays: records of this one go to a folder beside it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from consilium.benchmarking.record import commit
from consilium.errors import ConsiliumError, nearest
from consilium.machine.processors import cpu_name
from consilium.ops.native.compile import tiers
from consilium.records.bench import BenchRecord
from consilium.records.io import read_json

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "bench" / "records"
FIRST = "decode-1-512"
"""Whose record says what the first kind of processor is."""


def home() -> Path:
    """Where records of this kind of processor are; the first kind has no folder of its own."""
    first = RECORDS / f"{FIRST}.json"
    if not first.exists() or read_json(BenchRecord, first).machine.startswith(cpu_name()):
        return RECORDS
    return RECORDS / re.sub(r"[^a-z0-9]+", "-", f"{cpu_name()} {tiers()[-1]}".lower())


def queue(records: Path) -> Mapping[str, Sequence[str]]:
    """What writes each record, shortest first, as it is run in ROOT: a record names no machine's folders."""
    records = Path(os.path.relpath(records, ROOT))
    command = (sys.executable, "-m", "consilium", "bench")
    speed = {
        "decode-tiny": (),
        "train-tiny": ("--against", "transformers"),
        "dense-against-moe": (),
        "decode-1b": (),
        "train-1b": ("--against", "transformers"),
        "passes-1b": ("--against", "transformers"),
    }
    commands = {
        name: (*command, name, *more, "--out", str(records / f"{name}.json")) for name, more in speed.items()
    }
    study = (sys.executable, str(ROOT / "bench" / "jacobs.py"), "--out", str(records / "jacobs.json"))
    sieve = (sys.executable, str(ROOT / "bench" / "filters.py"), "--out", str(records / "filters.json"))
    scripts = {
        name: (sys.executable, str(ROOT / "bench" / f"{name}.py"), "--out", str(records / f"{name}.json"))
        for name in ("experts", "processes", "costs", "formats", "attention", "invariance", "speculation")
    }
    decoding = {
        f"{kind}-{batch}-{context}{ending}": (
            *(sys.executable, str(ROOT / "bench" / "decode.py"), "--out"),
            str(records / f"{kind}-{batch}-{context}{ending}.json"),
            *("--batch", str(batch), "--context", str(context)),
            *(("--prompts",) if kind == "prompts" else ()),
            *(("--model", ending[1:]) if ending else ()),
        )
        for kind, batch, context, ending in (
            *(("decode", 1, 512, ""), ("decode", 8, 512, ""), ("decode", 1, 8192, "")),
            *(("prompts", 1, 512, ""), ("prompts", 1, 4096, "")),
            *(("decode", 1, 512, "-mixtral"), ("decode", 1, 512, "-qwen3-moe")),
        )
    }
    answering = {
        name: (
            sys.executable,
            str(ROOT / "bench" / "serving.py"),
            "--out",
            str(records / f"{name}.json"),
            *more,
        )
        for name, more in (
            ("serving-8", ("--clients", "8")),
            ("serving-8-shared-400", ("--clients", "8", "--shared", "400")),
            ("serving-32", ("--clients", "32")),
        )
    }
    return {"filters": sieve, **commands, **scripts, **decoding, **answering, "jacobs": study}


def is_done(record: Path) -> bool:
    """Whether ``record`` was measured on this processor and of this commit."""
    if not record.exists():
        return False
    found = read_json(BenchRecord, record)
    return found.commit == commit() and found.machine.startswith(cpu_name())


def pick(names: Sequence[str], commands: Mapping[str, Sequence[str]]) -> list[str]:
    for name in names:
        if name not in commands:
            raise ConsiliumError(f"unknown benchmark {name!r}.{nearest(name, commands)}")
    return list(names or commands)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--records", type=Path, default=home(), metavar="FOLDER")
    chosen = parser.parse_args(arguments)
    chosen.records.mkdir(parents=True, exist_ok=True)
    commands = queue(chosen.records)
    names = pick(chosen.names, commands)
    failed: list[str] = []
    for place, name in enumerate(names, start=1):
        if is_done(chosen.records / f"{name}.json") and not chosen.again:
            print(f"[{place} of {len(names)}] {name}: on record for this commit", flush=True)
            continue
        print(f"[{place} of {len(names)}] {name} ...", flush=True)
        begun = time.monotonic()
        if subprocess.run(commands[name], check=False, cwd=ROOT).returncode:
            failed.append(name)
        print(f"[{place} of {len(names)}] {name}: {time.monotonic() - begun:.0f} s", flush=True)
    print(
        f"failed: {', '.join(failed)}"
        if failed
        else "all benchmarks are on record; now python docs/generate.py"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConsiliumError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; run it again to go on")
