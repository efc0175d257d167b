"""``consilium doctor``: what this machine and this installation can do, and what looks wrong."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace


def arguments(parser: ArgumentParser) -> None:
    """No arguments of its own."""


def run(options: Namespace) -> int:
    from consilium.cli.actions import doctor as action

    return action.run(options)
