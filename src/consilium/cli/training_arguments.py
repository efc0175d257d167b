"""Options that describe a training run; without torch, so that help is instant."""

from __future__ import annotations

from argparse import ArgumentParser

from consilium.cli.arguments import count


def training_arguments(parser: ArgumentParser) -> None:
    """Everything about a run but its model and folder."""
    parser.add_argument(
        "--data",
        action="append",
        metavar="PATH",
        help=".txt, .md, .py, .jsonl or a folder; may be given several times; default: built-in text",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, metavar="N", help="optimizer steps")
    length.add_argument("--minutes", type=float, metavar="M", help="calibrated once into steps; default 3")
    length.add_argument("--tokens", type=count, metavar="N", help="tokens to train on, such as 2M")
    parser.add_argument(
        "--params", type=count, metavar="N", help="scale the recipe to about N parameters, such as 8M"
    )
    parser.add_argument("--batch", type=int, metavar="B", help="sequences a step")
    parser.add_argument("--seq", type=int, metavar="S", help="tokens a sequence")
    parser.add_argument("--lr", type=float, metavar="X", help="peak learning rate")
    parser.add_argument(
        "--balance", metavar="NAME", help="none, switch, sequence, bias, bias-linear, adaptive, switch-z"
    )
    parser.add_argument(
        "--save-every", metavar="N", help="steps between checkpoints, or minutes; default 10m"
    )
    parser.add_argument("--eval-every", type=int, metavar="N", help="steps between validations")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="default 0")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: all cores")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), help="of matrix products; auto measures"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key, such as model.moe.router.select.k=2",
    )
