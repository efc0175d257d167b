"""Options of sampling; without torch, so that help is instant."""

from __future__ import annotations

from argparse import ArgumentParser


def sampling_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--max-tokens", type=int, default=64, metavar="N", help="new tokens at most; default 64"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 is greedy, the default"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="keep the N most likely tokens; 0 is off"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest tokens of mass P"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text")
