"""The dtype of matrix products that is faster here, measured: bfloat16 loses to float32 on many CPUs.

Legend: B rows, S tokens a row.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Final, Literal

import torch

from consilium.config.model import MTP, Model
from consilium.model.build import build, torch_dtype
from consilium.model.types import Inputs, Objective, Options
from consilium.moe.types import Mode
from consilium.planner.parameters import parameters

_LARGEST: Final = 50_000_000
"""Parameters of a block beyond which its products are so large that one of them tells."""
_ROWS, _LENGTH, _VOCABULARY = 4, 256, 512


def faster_dtype(model: Model) -> Literal["float32", "bfloat16"]:
    """Time a training pass of one block of ``model`` in both dtypes; bfloat16 must win clearly.

    Small experts lose more by the cast of their weights than their products gain, so that a matrix product
    alone would not tell. Takes a second or two.
    """
    block = dataclasses.replace(
        model,
        layers=1,
        attention=model.attention.at(0),
        dense_first=0,
        moe_every=1,
        mtp=MTP(),
        vocab_size=min(model.vocab_size, _VOCABULARY),
    )
    run = _pass(block) if parameters(block).total < _LARGEST else _product()
    return "bfloat16" if _seconds(run, "bfloat16") < 0.8 * _seconds(run, "float32") else "float32"


def _pass(model: Model) -> Callable[[str], None]:
    decoder = build(model)
    length = min(_LENGTH, model.max_length)
    ids_BS = torch.arange(_ROWS * length).view(_ROWS, length) % model.vocab_size

    def run(dtype: str) -> None:
        options = Options(
            mode=Mode(training=True, generator=torch.Generator().manual_seed(0)), dtype=torch_dtype(dtype)
        )
        losses = decoder(Inputs(ids_BS), options=options, objective=Objective(ids_BS.roll(-1, 1)))
        (losses.nll / ids_BS.numel()).backward()
        decoder.zero_grad(set_to_none=True)

    return run


def _product() -> Callable[[str], None]:
    factors = {name: torch.ones(512, 512, dtype=torch_dtype(name)) for name in ("float32", "bfloat16")}

    def run(dtype: str) -> None:
        torch.mm(factors[dtype], factors[dtype])

    return run


def _seconds(run: Callable[[str], None], dtype: str) -> float:
    run(dtype)
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        run(dtype)
        best = min(best, time.perf_counter() - begun)
    return best
