"""What it costs that a prompt has the same bits whoever else is read: tokens a second of short prompts.

usage: python bench/invariance.py [--turns 7] [--out bench/records/invariance.json]

``deepseek-v3:1b`` with random weights in bfloat16 and packed. Prompts of some tokens are each a pass of their
own, in which every expert that one of them visits is read; the rival is one pass over as many tokens, which
is what prompts packed behind each other would take, and other bits. Steps of decoding pay nothing: a row's
sums have one order in any batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from kept import keep

from consilium.benchmarking.record import record, several
from consilium.config.model import MTP
from consilium.engine.batch import PROMPT_PART
from consilium.engine.engine import Engine
from consilium.engine.request import Request
from consilium.machine.processors import threads
from consilium.model.build import build
from consilium.model.decoder import Decoder
from consilium.model.packing import pack
from consilium.ops.weights import PACKINGS
from consilium.recipes import catalogue
from consilium.records.bench import Figure

LENGTHS: Final = (PROMPT_PART, 128, 32)
"""Tokens of a prompt, the first what a pass takes at most."""


def read(model: Decoder, length: int) -> float:
    """Tokens a second of as many prompts as one pass has tokens."""
    engine, ids = Engine(model), torch.Generator().manual_seed(length)
    for _ in range(PROMPT_PART // length):
        prompt = torch.randint(3, 250, (length,), generator=ids).tolist()
        engine.submit(Request(prompt=tuple(prompt), max_tokens=2, stop_ids=()))
    begun = time.perf_counter()
    while engine.waiting:
        engine.step()
    return PROMPT_PART / (time.perf_counter() - begun)


def figures(turns: int) -> Iterator[Figure]:
    config = dataclasses.replace(catalogue.recipe("deepseek-v3", "1b"), mtp=MTP())
    for packing in (None, *PACKINGS):
        model = build(config, dtype="bfloat16")
        if packing is not None:
            pack(model, packing)
        speeds: dict[int, list[float]] = {length: [] for length in LENGTHS}
        for _ in range(turns + 1):
            for length, values in speeds.items():
                values.append(read(model, length))
        speeds = {length: values[1:] for length, values in speeds.items()}
        whole = f"{packing or 'bfloat16'}, one pass of {PROMPT_PART}"
        yield several(whole, "tokens/s", speeds[PROMPT_PART])
        for length in LENGTHS[1:]:
            alone = f"{packing or 'bfloat16'}, {PROMPT_PART // length} prompts of {length}"
            yield several(alone, "tokens/s", speeds[length], (whole, speeds[PROMPT_PART]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(threads())
    made = record(
        "invariance", f"python bench/invariance.py --turns {options.turns}", tuple(figures(options.turns))
    )
    keep(made, options.out)


if __name__ == "__main__":
    main()
