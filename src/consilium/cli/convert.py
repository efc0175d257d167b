"""``consilium convert``: weights to another dtype or file format."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from consilium.cli.arguments import path


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", type=path, metavar="SRC", help="a run, a checkpoint or a downloaded folder")
    parser.add_argument("destination", type=path, metavar="DST", help="a new folder, or a new file.gguf")
    parser.add_argument(
        "--to",
        choices=("hf", "gguf"),
        default="hf",
        help="a Hugging Face folder or one file for llama.cpp; default hf",
    )
    parser.add_argument(
        "--dtype",
        metavar="NAME",
        help="float32 or bfloat16, for gguf also q8_0 or q4_0; default: that of SRC",
    )


def run(options: Namespace) -> int:
    from consilium.cli.actions import convert as action

    return action.run(options)
