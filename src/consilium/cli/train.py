"""``consilium train``: a recipe or a YAML file, a budget, a run folder."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from consilium.cli.arguments import path
from consilium.cli.training_arguments import training_arguments


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="recipe such as deepseek-v3:tiny, or a config.yaml")
    parser.add_argument("--out", required=True, type=path, metavar="DIR", help="the run folder")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint, bit for bit"
    )
    training_arguments(parser)


def run(options: Namespace) -> int:
    from consilium.cli.actions import train as action

    return action.run(options)
