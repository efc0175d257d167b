"""``consilium eval``: bits per byte of a checkpoint on text, by domain."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from consilium.cli.arguments import count, json_flag, path


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=path, metavar="FOLDER", help="a run or a checkpoint")
    parser.add_argument(
        "--data", metavar="PATH", help=".txt, .md, .py, .jsonl or folder; default: built-in held-out text"
    )
    parser.add_argument("--seq", type=count, metavar="S", help="tokens a window; default: as in training")
    parser.add_argument("--limit", type=count, metavar="N", help="read at most N tokens a domain")
    json_flag(parser)


def run(options: Namespace) -> int:
    from consilium.cli.actions import eval as action

    return action.run(options)
