"""``consilium chat``: a conversation in the terminal.

A model without a chat format continues questions and answers.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from consilium.cli.arguments import path
from consilium.cli.sampling_arguments import sampling_arguments


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=path, metavar="FOLDER", help="a run or a checkpoint")
    sampling_arguments(parser)


def run(options: Namespace) -> int:
    from consilium.cli.actions import chat as action

    return action.run(options)
