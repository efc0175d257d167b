"""``consilium upcycle``: a sparse model out of a trained one, and how far it is from it."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, final, get_args

from consilium.cli.arguments import assignments, count, json_flag, path
from consilium.cli.exits import command_line
from consilium.cli.progress import Lines, note
from consilium.cli.running import running_arguments, settle
from consilium.errors import ConsiliumError, nearest
from consilium.report.plain import sized
from consilium.words.say import say

if TYPE_CHECKING:
    from consilium.config.upcycling import Upcycling
    from consilium.records.upcycling import Certificate

METHODS = (
    "split-random",
    "split-cluster",
    "split-inner",
    "split-inter",
    "split-graph",
    "copy",
    "virtual-group",
    "qwen",
    "drop",
    "btx",
    "carve",
    "expand",
    "mla",
)
FAILED = 1
"""The result is written, and further from its source than its method promises."""


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "dense", type=path, metavar="DENSE", help="a run, a checkpoint, a downloaded folder or a .gguf file"
    )
    parser.add_argument("out", type=path, metavar="OUT", help="a new folder")
    parser.add_argument("--method", required=True, metavar="NAME", help=", ".join(METHODS))
    parser.add_argument(
        "--experts",
        type=count,
        metavar="E",
        help="routed experts; of virtual-group: copies; default: of btx one a source, of mla none",
    )
    parser.add_argument("--top-k", type=count, metavar="K", help="experts that a token uses")
    parser.add_argument(
        "--shared", type=count, metavar="S", help="shared experts: slices, or 1 for the whole network"
    )
    parser.add_argument(
        "--granularity",
        type=count,
        metavar="G",
        help="parts that each copy is cut into (virtual-group, qwen); default: 1",
    )
    parser.add_argument(
        "--sources",
        type=path,
        nargs="+",
        default=[],
        metavar="MODEL",
        help="fine-tunes of DENSE, folders or .gguf files, an expert each (btx)",
    )
    parser.add_argument(
        "--prompts",
        type=path,
        metavar="FILE",
        help="YAML of prompts that say what each source is for: where gates begin (btx); default: at random",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of what is drawn; default: 0")
    parser.add_argument(
        "--data",
        type=path,
        metavar="PATH",
        help="calibration text, a file or folder; default: builtin, what the built-in text holds out",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another key: gate, scale, spread, dense_first, moe_every, calibration_tokens, method.*",
    )
    running_arguments(parser, doing="to write")
    json_flag(parser)


def run(options: Namespace) -> int:
    from consilium.checkpoint.folders import checkpoint_in

    asked = asked_of(options)
    checkpoint_in(options.dense)  # light: what is no model is told before torch is imported
    from consilium.upcycling.run import How
    from consilium.upcycling.run import run as upcycle

    place = settle(options)
    models = [options.dense, *options.sources]
    how = How(options.data, place.device, place.dtype)
    with ExitStack() as stack:
        made = upcycle(models, options.out, asked, how, progress=_Stages(stack))
    if options.json:
        print(json.dumps(_data(options.out, made)))
    else:
        print(_text(options, asked, made))
    return 0 if made.kept else FAILED


def asked_of(options: Namespace) -> Upcycling:
    """The options as one configuration. Raises ConsiliumError naming the nearest method or key."""
    from consilium.config.upcycling import configured

    if options.method not in METHODS:
        raise ConsiliumError(f"upcycle: unknown method {options.method!r}.{nearest(options.method, METHODS)}")
    given = {
        "method": options.method,
        "seed": options.seed,
        "experts": options.experts or len(options.sources) or None,
        "top_k": options.top_k,
        "shared": options.shared,
        "method.granularity": options.granularity,
    }
    _check_for_whom(options)
    texts = {key: str(value) for key, value in given.items() if value is not None}
    prompts = {} if options.prompts is None else _prompted(options.prompts)
    further = assignments(options.set)
    for key in further:
        if texts.get("method" if key == "method.kind" else key, further[key]) != further[key]:
            raise ConsiliumError(f"upcycle: --set {key}={further[key]} says other than its option; give one.")
    return configured(texts | prompts | further)


def _check_for_whom(options: Namespace) -> None:
    whose = {"granularity": ("virtual-group", "qwen"), "prompts": ("btx",)}
    for option, methods in whose.items():
        if getattr(options, option) is not None and options.method not in methods:
            raise ConsiliumError(
                f"upcycle: --{option} is for {' and '.join(methods)}, and --method is {options.method};"
                " leave it out."
            )


def _prompted(file: Path) -> dict[str, str]:
    """The keys that prompts are given with."""
    from consilium.config.io import read_yaml, to_data
    from consilium.config.upcycling import PromptFile

    found = to_data(read_yaml(PromptFile, file))
    return {"method.directions.kind": "hidden", "method.directions.prompts": json.dumps(found["experts"])}


@final
class _Stages:
    """A line of progress for each stage of the work."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._lines: dict[str, Lines] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what == "taking":
            note(say("the new model takes {size} on the disk", size=sized(total)))
            return
        if what not in self._lines:
            self._stack.close()
            verbs = {
                "weighing": say("weighing neurons"),
                "measuring": say("measuring"),
                "comparing": say("comparing"),
                "writing": say("writing"),
            }
            self._lines[what] = self._stack.enter_context(Lines(verbs[what]))
        self._lines[what](done, total)


def _data(out: Path, made: Certificate) -> dict[str, object]:
    from consilium.records.io import adapter

    certificate = adapter(type(made)).dump_python(made, mode="json")
    return {"written": str(out), "kept": made.kept, "certificate": certificate}


def _text(options: Namespace, asked: Upcycling, made: Certificate) -> str:
    from consilium.records.loads import max_over_mean
    from consilium.report.plain import columns

    head = (say("layer"), say("max difference"), say("relative"), say("busiest expert"))
    rows = [
        (
            str(found.layer),
            f"{found.largest:.2e}",
            f"{found.relative:.2e}",
            f"{max_over_mean(found.load):.2f}" if found.load else say("dense"),
        )
        for found in made.layers
    ]
    if not any(found.load for found in made.layers):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return "\n".join([columns([head, *rows]), *_summary(made), *_next(options, asked)])


def _summary(made: Certificate) -> list[str]:
    apart = say(
        "logits: max difference {largest:.2e}, relative {relative:.2e}",
        largest=made.largest,
        relative=made.relative,
    )
    bits = say(
        "bits per byte: {before:.4f} before, {after:.4f} after ({change:+.4f}), on {tokens:,} tokens",
        before=made.bits_per_byte_before,
        after=made.bits_per_byte_after,
        change=made.bits_per_byte_after - made.bits_per_byte_before,
        tokens=made.tokens,
    )
    if made.promise is None:
        kept = say("the method promises no equality; training closes the difference")
    elif made.kept:
        kept = say("equal, as the method promises (relative below {promise:.0e})", promise=made.promise)
    else:
        kept = say(
            "NOT equal: the method promises a relative difference below {promise:.0e}", promise=made.promise
        )
    return [apart, bits, kept]


def _layout(out: Path) -> str:
    """Who opens the result."""
    from consilium.checkpoint.hf.architecture import Native, architecture
    from consilium.checkpoint.hf.config import config_from_folder

    found = architecture(config_from_folder(out))
    if found is None:
        return say("layout: our own; no published code computes this model, so Consilium alone opens it")
    if found in get_args(Native):
        return say("layout: {layout}, which transformers opens", layout=found)
    return say("layout: {layout}, which the code published with that model opens", layout=found)


def _next(options: Namespace, asked: Upcycling) -> list[str]:
    from consilium.planner.upcycled import spread

    out = options.out
    gate = say(
        "gate: rows levelled on the text so that loads are even; logits of standard deviation {spread:g}",
        spread=spread(asked),
    )
    data = [] if options.data is None else ["--data", str(options.data)]
    trained = command_line("train", out, "--out", f"{out}-trained", *data)
    gates = [gate] if asked.method.kind not in ("expand", "mla") else []
    return [*gates, _layout(out), say("written: {out}; go on with {command}", out=str(out), command=trained)]
