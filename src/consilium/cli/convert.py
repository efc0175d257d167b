"""``consilium convert``: weights to another dtype or file format."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from consilium.cli.arguments import json_flag, path
from consilium.cli.progress import Lines
from consilium.errors import ConsiliumError, nearest
from consilium.words.say import Say, plain, say


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source", type=path, metavar="SRC", help="a run, a checkpoint, a downloaded folder or a .gguf file"
    )
    parser.add_argument("destination", type=path, metavar="DST", help="a new folder, or a new file.gguf")
    parser.add_argument(
        "--to",
        choices=("hf", "gguf"),
        default="hf",
        help="a Hugging Face folder or one file for llama.cpp; default hf",
    )
    parser.add_argument(
        "--dtype",
        metavar="NAME",
        help="float32, bfloat16 or float16, for gguf also q8_0, q4_0 or q4_1; default: that of SRC",
    )
    parser.add_argument(
        "--weights",
        choices=("int8", "int4", "uint4", "fp8"),
        help="pack matrices into 8 or 4 bits, for generating; for gguf give --dtype q8_0 or q4_0",
    )
    json_flag(parser)


def run(options: Namespace) -> int:
    from consilium.checkpoint.folders import checkpoint_in, refuse_inside

    source = checkpoint_in(options.source)
    refuse_inside("convert", options.source, options.destination)
    if options.weights is not None and options.to == "gguf":
        raise ConsiliumError("convert: --weights is for folders; for a GGUF file give --dtype q8_0 or q4_0.")
    writers = {"hf": _to_folder, "gguf": _to_gguf}
    voice = plain if options.json else say
    start = time.monotonic()
    with Lines(say("converting"), " GB") as shown:
        notes = writers[options.to](source, options, shown, voice)
    size, seconds = _size(options.destination), time.monotonic() - start
    if options.json:
        written = {"written": str(options.destination), "bytes": size, "seconds": seconds, "notes": notes}
        print(json.dumps(written))
        return 0
    print(
        f"{options.destination}  {size / 1e6:,.1f} MB  {seconds:.1f} s", *(f"  {n}" for n in notes), sep="\n"
    )
    return 0


def _to_folder(source: Path, options: Namespace, shown: Lines, say: Say) -> tuple[str, ...]:
    from consilium.checkpoint.convert import convert, pack
    from consilium.model.build import DTYPES

    destination, dtype = options.destination, options.dtype
    if dtype is not None and dtype not in DTYPES:
        gguf = " Types such as q8_0 are for --to gguf." if dtype.lower().startswith("q") else ""
        raise ConsiliumError(f"convert: unknown --dtype {dtype!r}.{gguf or nearest(dtype, DTYPES)}")
    if destination.suffix == ".gguf":
        raise ConsiliumError(f"convert: {destination} would be a folder; add --to gguf to write a GGUF file.")
    if options.weights is not None:
        pack(source, destination, options.weights, dtype=dtype, progress=_in_gigabytes(shown))
    else:
        convert(source, destination, dtype=dtype, progress=_in_gigabytes(shown))
    return (say("opens with consilium.load({folder!r})", folder=str(destination)),)


def _to_gguf(source: Path, options: Namespace, shown: Lines, say: Say) -> tuple[str, ...]:
    destination = options.destination
    if destination.suffix != ".gguf":
        raise ConsiliumError(
            f"convert: {destination} is no name of a GGUF file; give one that ends in .gguf."
        )
    from consilium.checkpoint.gguf.export import export

    done = export(source, destination, dtype=options.dtype, progress=_in_gigabytes(shown))
    typed = say("{share:.1%} of the values are of this type, the others float32", share=done.typed)
    return typed, *done.notices


def _in_gigabytes(shown: Lines) -> Callable[[int, int], None]:
    return lambda done, total: shown(done / 1e9, total / 1e9)


def _size(destination: Path) -> int:
    paths = [destination] if destination.is_file() else [p for p in destination.rglob("*") if p.is_file()]
    return sum(path.stat().st_size for path in paths)
