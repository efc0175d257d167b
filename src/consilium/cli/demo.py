"""``consilium demo``: a small DeepSeek-V3 from nothing to a report, on text that is already here."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from consilium.cli.arguments import path


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=3.0, metavar="M", help="training time; default 3")
    parser.add_argument(
        "--out", type=path, default=Path("runs/demo"), metavar="DIR", help="default runs/demo"
    )
    parser.add_argument(
        "--compare",
        choices=("dense",),
        help="also train a dense model of the same active parameters on the same tokens",
    )


def run(options: Namespace) -> int:
    from consilium.cli.actions import demo as action

    return action.run(options)
