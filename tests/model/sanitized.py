"""A process whose native kernels are checked by the address and undefined-behaviour sanitizers as they run.

usage: LD_PRELOAD=libasan.so python sanitized.py FOLDER: compile there, decode awkward shapes, exit 0.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from pathlib import Path

import torch

from consilium.config.attention import GQA
from consilium.config.model import Model
from consilium.kv.build import build_cache
from consilium.model import native
from consilium.model.native import NativeDecoder
from consilium.model.packing import pack
from consilium.model.types import Inputs, Options
from consilium.moe.types import Mode
from consilium.ops.native import compile as compiling
from consilium.ops.native import training
from consilium.ops.native.compile import FLAGS, VARIABLE, Built, tiers
from consilium.ops.native.library import Kernels, opened
from consilium.ops.weights import PACKINGS
from small import KINDS, WINDOWED, lively

WIDTHS = (torch.float32, torch.bfloat16)
CHECKS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")


def decode(config: Model, packing: str | None) -> None:
    """Rows of several lengths, a cache that is just long enough."""
    model = lively(dataclasses.replace(config, hidden_size=36)).eval()
    if packing == "bfloat16":
        model = model.to(torch.bfloat16)
    elif packing is not None:
        pack(model, next(kind for kind in PACKINGS if kind == packing))
    prepared = NativeDecoder.of(model)
    assert prepared is not None
    cache = build_cache(model.config, batch=5, capacity=9, dtype=torch.float32)
    for step in range(9):
        inputs = Inputs(torch.arange(5)[:, None], position_BS=torch.full((5, 1), step))
        logits = prepared.step(inputs, cache, Options(mode=Mode(counts_only=True))).logits
    assert torch.isfinite(logits).all()
    cache = build_cache(model.config, batch=1, capacity=50, dtype=torch.float32)
    for first, length in ((0, 3), (3, 33), (36, 14)):
        inputs = Inputs(torch.arange(length)[None], position_BS=torch.arange(first, first + length)[None])
        logits = prepared.read(inputs, cache, Options(mode=Mode(counts_only=True))).logits
    assert torch.isfinite(logits).all()


def slide(window: int, dtype: torch.dtype) -> None:
    """A window that leaves whole spans behind, in parts of a prompt and in single tokens."""
    attention = GQA(heads=4, kv_heads=2, head_dim=10, window=window)
    model = (
        lively(dataclasses.replace(WINDOWED, layers=1, attention=attention, max_length=2048)).eval().to(dtype)
    )
    prepared = NativeDecoder.of(model)
    assert prepared is not None
    cache = build_cache(model.config, batch=1, capacity=1301, dtype=dtype)
    for first, length in ((0, 512), (512, 512), (1024, 277)):
        inputs = Inputs(
            torch.arange(length)[None] % 300, position_BS=torch.arange(first, first + length)[None]
        )
        assert torch.isfinite(prepared.read(inputs, cache, Options(mode=Mode(counts_only=True))).logits).all()
    for position in (255, 256, 700, 1300):
        inputs = Inputs(torch.zeros(1, 1, dtype=torch.int64), position_BS=torch.tensor([[position]]))
        assert torch.isfinite(prepared.step(inputs, cache, Options(mode=Mode(counts_only=True))).logits).all()


def learn(kernels: Kernels) -> None:
    """Every product of training, each side in either width, and nothing behind what it is given."""
    training.kernels = lambda: kernels
    for kind, own, other in itertools.product(range(3), WIDTHS, WIDTHS):
        for counts_E, outputs, inputs in (((3, 0, 7, 1), 33, 47), ((600, 5), 17, 1100)):
            rows = torch.randn(sum(counts_E), inputs if kind == 0 else outputs).to(own)
            shape = (len(rows), inputs) if kind == 2 else (len(counts_E), outputs, inputs)
            sides = rows, torch.randn(shape).to(own if kind == 2 else other)
            ends_E = torch.tensor(counts_E).cumsum(0)
            assert training.multiply_sorted(*sides, ends_E, kind, wide=True).isfinite().all()


def main(folder: str) -> int:
    os.environ[VARIABLE] = tiers()[-1]
    compiling._COMMON = (*compiling._COMMON, *CHECKS)  # pyright: ignore[reportPrivateUsage, reportConstantRedefinition]
    found = compiling.built(Path(folder))
    assert isinstance(found, Built), (found, FLAGS)
    kernels = opened(found.path, found.tier)
    native.kernels = lambda: kernels
    torch.set_num_threads(2)
    for config in (*KINDS.values(), WINDOWED):
        for packing in (None, "bfloat16", *PACKINGS):
            decode(config, packing)
    learn(kernels)
    for window in (1, 100, 513):
        for dtype in (torch.float32, torch.bfloat16):
            slide(window, dtype)
    print("clean")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
