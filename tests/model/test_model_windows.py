"""Native kernels read the slots of a window and nothing before it, in every tier.

Legend: S tokens.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from consilium.config.attention import GQA
from consilium.kv.build import build_cache
from consilium.model.types import Inputs
from consilium.ops.native.compile import Tier
from kernels import HERE
from model.test_model_native import COUNTS, Paged, error, prepare
from model.test_model_prompts import ids_of, read
from small import DENSE, lively


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("window", [1, 255, 256, 257, 300, 701, 5000])
def test_a_window_reads_nothing_before_it(window: int, tier: Tier) -> None:
    """Over the ends of spans and pages: what no token sees is NaN, and pages and company change no bit."""
    attention = GQA(heads=6, kv_heads=2, head_dim=8, window=window)
    config = dataclasses.replace(DENSE, attention=attention, layers=1, max_length=1024)
    model = lively(config).eval()
    prepared, lengths, generator = prepare(model, tier), [0, 5, 256, 700], torch.Generator().manual_seed(2)
    paged, dense = Paged(4, 701, 48, 32), build_cache(config, batch=4, capacity=701, dtype=torch.float32)
    rows = torch.randn(4, 700, 32, generator=generator)
    dense.layers[0][:, :700] = rows
    for place, length in enumerate(lengths):
        slots = torch.arange(max(0, length + 1 - window), length)
        paged.storage_NPC[paged.table_BM[place, slots // 48], slots % 48] = rows[place, slots]
    inputs = Inputs(torch.tensor([[1], [2], [3], [4]]), position_BS=torch.tensor(lengths)[:, None])
    with torch.inference_mode():
        right = model(inputs, cache=dense, options=COUNTS).logits
        found = prepared.step(inputs, paged, COUNTS).logits
        paged.table_BM = paged.table_BM[3:]
        last = Inputs(inputs.ids_BS[3:], position_BS=torch.tensor([[700]]))
        alone = prepared.step(last, paged, COUNTS).logits
    assert error(found, right) < 1e-5
    assert torch.equal(found[3:], alone)


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("window", [1, 30, 511, 512, 513, 600, 2000])
def test_a_window_over_several_spans_gives_what_the_modules_give(window: int, tier: Tier) -> None:
    """Its tokens before the last part that none of it sees are NaN there, and pages change no bit."""
    attention = GQA(heads=4, kv_heads=2, head_dim=8, window=window)
    config = dataclasses.replace(DENSE, attention=attention, layers=1, max_length=2048)
    model = lively(config).eval()
    prepared, ids_1S = prepare(model, tier), ids_of(1300)
    caches = build_cache(config, batch=1, capacity=1300, dtype=torch.float32), Paged(1, 1300, 7, 32)
    found: list[Tensor] = []
    with torch.inference_mode():
        for cache in caches:
            read(prepared, ids_1S[:, :1024], [512, 512], cache)
            if isinstance(cache, Paged):
                forget(cache, 1024 + 1 - window)
            last = Inputs(ids_1S[:, 1024:], position_BS=torch.arange(1024, 1300)[None])
            found.append(prepared.read(last, cache, COUNTS).logits)
        right = model(ids_1S).logits[:, -1:]
    assert error(found[0], right) < 1e-5
    assert torch.equal(found[0], found[1])


def forget(cache: Paged, slots: int) -> None:
    slot = torch.arange(max(0, slots))
    size = cache.storage_NPC.shape[1]
    cache.storage_NPC[cache.table_BM[0, slot // size], slot % size] = torch.nan
