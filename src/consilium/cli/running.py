"""Options of every verb that runs a model: device, threads and dtype; torch is imported to settle them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Place:
    """Where and in what a model runs."""

    device: str
    """``cpu`` or ``cuda:N``, which is here."""
    threads: int
    """Of the CPU; torch computes with as many from now on."""
    dtype: str | None
    """None is the verb's own choice, such as the dtype of the folder."""


def running_arguments(
    parser: argparse.ArgumentParser,
    *,
    dtypes: Sequence[str] = DTYPES,
    dtype: str = "as stored",
    doing: str = "to compute in",
) -> None:
    """Add ``--device``, ``--threads`` and ``--dtype``, whose help says what for and the default ``dtype``."""
    parser.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N; auto is the first CUDA device, and the CPU where there is none",
    )
    threads_argument(parser)
    parser.add_argument(
        "--dtype", choices=tuple(dtypes), help=f"{_listed(dtypes)}, {doing}; default: {dtype}"
    )


def threads_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=_threads,
        metavar="N",
        help="CPU threads; default: OMP_NUM_THREADS, or as many as have a core of their own here",
    )


def weights_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        choices=("int8", "int4", "uint4", "fp8"),
        help="pack matrices into 8 or 4 bits as they are read (uint4 as Q4_1 and Q4_K files have them, "
        "fp8 as DeepSeek-V3): smaller and faster; default: as stored",
    )


def settle(options: argparse.Namespace) -> Place:
    """Turn the options into values, and make torch compute with that many threads.

    Raises ConsiliumError for a device that is not here.
    """
    import torch

    from consilium.machine.device import choose_device
    from consilium.machine.processors import threads

    place = Place(choose_device(options.device), options.threads or threads(), options.dtype)
    torch.set_num_threads(place.threads)
    return place


def _device(text: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda or cuda:N")
    return text


def _threads(text: str) -> int:
    """Torch takes any number and then fails in odd ways."""
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of threads from 1 to 1024")
    return int(text)


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
