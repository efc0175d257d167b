"""``consilium bench``: measure speed on this machine, beside a rival where one is asked for."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from consilium.cli.arguments import json_flag, path

NAMES = ("train-tiny", "train-1b", "dense-against-moe", "decode-tiny", "decode-1b")


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="train-tiny", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--against", choices=("transformers",), help="measure the rival in the same run")
    parser.add_argument("--out", type=path, metavar="FILE", help="also write the record there")
    json_flag(parser)


def run(options: Namespace) -> int:
    from consilium.cli.actions import bench as action

    return action.run(options)
