"""``consilium plan``: what a model costs before it is built."""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from consilium.cli.arguments import assignments, count, json_flag, size
from consilium.errors import ConsiliumError
from consilium.words.say import say

if TYPE_CHECKING:
    from consilium.config.model import Model

EVERY_LAW = "all"
DTYPES = ("float32", "bfloat16", "int8", "int4")


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="recipe name[:size], a folder, or a .yaml file of a model; default: --law alone",
    )
    parser.add_argument(
        "--fit",
        type=size,
        metavar="SIZE",
        help="memory to fit into, such as 24GiB or 80G; default: not asked",
    )
    parser.add_argument(
        "--context",
        type=count,
        metavar="S",
        help="tokens of a sequence to serve; default: the model's length",
    )
    parser.add_argument(
        "--batch", type=count, metavar="B", help="sequences at once, with --context; default: 1"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help=f"of weights and cache with --context: {', '.join(DTYPES)}; default: bfloat16",
    )
    parser.add_argument(
        "--tokens", type=count, metavar="N", help="training tokens to cost, such as 8.1T; default: not asked"
    )
    parser.add_argument(
        "--upcycle",
        action="append",
        metavar="KEY=VALUE",
        help="plan what consilium upcycle makes of MODEL: method=copy, experts=8, top_k=2 and its other keys;"
        " default: MODEL itself",
    )
    parser.add_argument("--against", metavar="MODEL", help="another model beside this one; default: none")
    parser.add_argument(
        "--law",
        nargs="?",
        const=EVERY_LAW,
        metavar="NAME",
        help="what scaling laws predict: all, or one such as clark:s-base, chinchilla; default: not asked",
    )
    parser.add_argument(
        "--params", type=count, metavar="N", help="with --law, in place of MODEL: active; default: of MODEL"
    )
    parser.add_argument(
        "--experts", type=count, metavar="E", help="with --params: experts, one active; default: 1"
    )
    json_flag(parser)


def run(options: Namespace) -> int:
    if options.model is None:
        return _run_without_model(options)
    if options.params is not None or options.experts is not None:
        raise ConsiliumError(
            "plan: --params and --experts ask a law about a model that does not exist; leave out MODEL,"
            " or leave them out."
        )
    from consilium.cli.costs import plan_data, plan_text
    from consilium.cli.models import read_model
    from consilium.planner.plan import plan

    model = _made(read_model(options.model), options)
    planned = plan(model)
    other = None if options.against is None else plan(read_model(options.against))
    if options.json:
        print(json.dumps(plan_data(model, planned, other, options), indent=2))
    else:
        print(plan_text(model, planned, other, options))
    return 0


def _made(model: Model, options: Namespace) -> Model:
    """``model``, or what an upcycling would make of it."""
    if options.upcycle is None:
        return model
    from consilium.config.upcycling import configured
    from consilium.planner.upcycled import upcycled

    return upcycled(model, configured(assignments(options.upcycle)))


def _run_without_model(options: Namespace) -> int:
    """Ask scaling laws at N and E alone."""
    from consilium.cli import predictions

    if options.law is None:
        raise ConsiliumError(
            "consilium plan: the following arguments are required: MODEL, or --law with --params N and"
            " --experts E; consilium plan --help shows the arguments."
        )
    found = predictions.of_point(options)
    if options.params is None and not options.json:
        print(say("no MODEL and no --params: the N and E that articles quote"))
    data = {"laws": dataclasses.asdict(found)}
    print(json.dumps(data, indent=2) if options.json else predictions.predictions_text(found).lstrip())
    return 0
