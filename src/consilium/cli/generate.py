"""``consilium generate``: continue prompts, streaming to the terminal."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from consilium.cli.arguments import json_flag, path
from consilium.cli.sampling_arguments import sampling_arguments


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=path, metavar="FOLDER", help="a run or a checkpoint")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be given several times: one batch"
    )
    sampling_arguments(parser)
    json_flag(parser)


def run(options: Namespace) -> int:
    from consilium.cli.actions import generate as action

    return action.run(options)
