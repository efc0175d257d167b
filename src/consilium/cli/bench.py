"""``consilium bench``: measure speed on this machine: of a model of yours, or of ours beside a rival."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from consilium.cli.arguments import json_flag, path
from consilium.cli.progress import Lines
from consilium.cli.running import Place, running_arguments, settle
from consilium.errors import ConsiliumError, closest
from consilium.words.say import say

if TYPE_CHECKING:
    from consilium.records.bench import BenchRecord as Record
    from consilium.records.bench import Figure

BESIDE = ("train-tiny", "train-1b", "passes-1b")
"""Those that can run beside a rival."""
NAMES = (*BESIDE, "dense-against-moe", "decode-tiny", "decode-1b")


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        default="train-tiny",
        metavar="FOLDER|NAME",
        help=f"a run, a checkpoint or a .gguf file to decode with, or one of {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--against", choices=("transformers",), help="measure the rival in the same run; default: none"
    )
    parser.add_argument(
        "--out", type=path, metavar="FILE", help="also write the record there; default: nowhere"
    )
    running_arguments(parser, dtype="of a folder as stored, of NAME the one that is faster here")
    json_flag(parser)


def run(options: Namespace) -> int:
    _check(options)
    from consilium.benchmarking.record import record
    from consilium.machine.allocator import keep_memory
    from consilium.records.io import to_json, write_json

    keep_memory()
    # Contestants share a process; by default oneDNN keeps 1024 kernels, and one would push out the other's.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    figures = _measure(options, settle(options))
    made = record(options.name, f"consilium {shlex.join(sys.argv[1:])}", figures)
    if options.out is not None:
        write_json(options.out, made)
    print(to_json(made, indent=None) if options.json else _table(made))
    return 0


def _check(options: Namespace) -> None:
    """Everything that would make minutes of measuring useless."""
    if options.against is not None and options.name not in BESIDE:
        raise ConsiliumError(f"bench: {options.name} has no rival to run; drop --against {options.against}.")
    if options.name not in NAMES:
        _refuse_unknown(options.name)
    elif (options.device, options.dtype) not in {("auto", None), ("cpu", None)}:
        raise ConsiliumError(
            f"bench: {options.name} runs on the CPU in its own dtype; drop --device and --dtype."
        )
    if options.out is not None:
        _refuse_unwritable(options.out)


def _refuse_unknown(name: str) -> None:
    meant = closest(name, NAMES)
    if meant is not None and not Path(name).exists():
        raise ConsiliumError(f"unknown benchmark {name!r}. Did you mean {meant!r}?")
    if not Path(name).exists() and name == Path(name).name:
        raise ConsiliumError(f"bench: {name} is neither a folder nor one of {', '.join(NAMES)}.")
    from consilium.checkpoint.folders import checkpoint_in

    checkpoint_in(Path(name))


def _refuse_unwritable(path: Path) -> None:
    """Raise ConsiliumError before minutes of measuring whose record could not be kept."""
    if path.is_dir():
        raise ConsiliumError(f"bench: --out {path} is a folder; give the name of a file.")
    from consilium.records.bench import BenchRecord
    from consilium.records.io import from_json, refuse_others

    refuse_others(path, "record", lambda text: from_json(BenchRecord, text, where=str(path)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConsiliumError(
            f"bench: cannot write {path}: {error.strerror or error}; choose another --out."
        ) from None


def _measure(options: Namespace, place: Place) -> tuple[Figure, ...]:
    with Lines(say("measuring"), say(" runs")) as said:
        return _figures(options, place, said)


def _figures(options: Namespace, place: Place, said: Lines) -> tuple[Figure, ...]:
    from consilium.benchmarking import benchmarks

    name = options.name
    if name in BESIDE:
        return benchmarks.training(name, options.against, said)
    if name == "dense-against-moe":
        return benchmarks.dense_against_moe(said)
    if name in NAMES:
        return benchmarks.decoding(benchmarks.yardstick(name), said)
    from consilium.checkpoint import store
    from consilium.checkpoint.folders import checkpoint_in

    model = store.load(checkpoint_in(Path(name)), dtype=place.dtype).to(place.device).eval()
    return benchmarks.decoding(model, said)


def _table(record: Record) -> str:
    lines = [say("{name} on {machine}", name=record.name, machine=record.machine)]
    for figure in record.figures:
        spread = say(
            "{low:,.0f} to {high:,.0f}, n = {n}", low=figure.minimum, high=figure.maximum, n=figure.n
        )
        lines.append(f"  {figure.name:<44}{figure.median:>10,.0f} {figure.unit}   ({spread})")
        if figure.ratio is not None:
            lines.append("    " + say("{ratio:.2f} times {rival}", ratio=figure.ratio, rival=figure.against))
    return "\n".join(lines)
