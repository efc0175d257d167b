"""``consilium doctor``: what this machine and this installation can do, and what looks wrong."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from consilium.cli.arguments import json_flag


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--routers",
        action="store_true",
        help="check every published router against its golden vectors instead",
    )
    json_flag(parser)


def run(options: Namespace) -> int:
    from consilium.cli.actions import doctor as action

    return action.routers(options) if options.routers else action.machine(options)
