"""Latents cached in 8 bits: kernels write the twin's bytes and read them as modules do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from consilium.config.attention import MLA
from consilium.kv.build import build_cache
from consilium.kv.paged import CachePart
from consilium.kv.rows import CacheFormat, EightBits
from consilium.model.types import Inputs
from consilium.ops.native.compile import Tier
from kernels import HERE
from model.test_model_native import COUNTS, error, prepare
from model.test_model_prompts import ids_of, read
from small import DEEPSEEK, lively

ONE = dataclasses.replace(DEEPSEEK, layers=1, dense_first=1, moe=None, max_length=1024)
"""A layer, whose rows depend on tokens alone."""
assert isinstance(ONE.attention, MLA)
ROWS = EightBits(ONE.attention.kv_rank, ONE.attention.rope_dim)


def cache_of(form: CacheFormat, batch: int = 1, capacity: int = 600) -> CachePart:
    return build_cache(ONE, batch=batch, capacity=capacity, dtype=torch.float32, form=form)


@pytest.mark.parametrize("tier", HERE)
def test_kernels_write_the_bytes_of_the_twin(tier: Tier) -> None:
    prepared = prepare(lively(ONE), tier)
    plain, eight = cache_of("model"), cache_of("int8")
    for cache in (plain, eight):
        read(prepared, ids_of(75), [40, 35], cache)
        prepared.step(Inputs(torch.tensor([[7]]), position_BS=torch.tensor([[75]])), cache, COUNTS)
    assert torch.equal(eight.layers[0][0, :76], ROWS.stored(plain.layers[0][0, :76]))
    assert not eight.layers[0][0, 76:].any()


@pytest.mark.parametrize("tier", HERE)
def test_a_latent_that_overflows_is_no_number_again_and_one_of_zeros_is_zeros(tier: Tier) -> None:
    """Zeros in its place would let the text go on."""
    model, cache = lively(ONE), cache_of("int8")
    with torch.no_grad():
        down = model.get_parameter("layers.0.attention.kv_down.weight")
        embed = model.get_parameter("embed.weight")
        down[: ROWS.rank] = 0
        down[0, 3], embed[:, 3], embed[7, 3] = 3e38, 0, 5
    prepared = prepare(model, tier)
    for place, token in enumerate((6, 7)):
        prepared.step(Inputs(torch.tensor([[token]]), position_BS=torch.tensor([[place]])), cache, COUNTS)
    zeros, overflown = ROWS.read(cache.layers[0][0, :2], torch.float32)[:, : ROWS.rank]
    assert (zeros == 0).all()
    assert overflown.isnan().all()


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("parts", [[75], [40, 35], [512, 38]], ids=str)
def test_prompts_are_read_as_modules_read_them(parts: list[int], tier: Tier) -> None:
    model = lively(ONE).eval()
    ids_1S, cache = ids_of(sum(parts)), cache_of("int8")
    with torch.inference_mode():
        found, right = read(prepare(model, tier), ids_1S, parts, cache_of("int8")), None
        first = 0
        for length in parts:
            position_1S = torch.arange(first, first + length)[None]
            right = model(Inputs(ids_1S[:, first : first + length], position_BS=position_1S), cache=cache)
            first += length
    assert right is not None
    assert error(found.logits, right.logits[:, -1:]) < 1e-2


@pytest.mark.parametrize("tier", HERE)
def test_steps_are_those_of_modules_and_of_each_alone(tier: Tier) -> None:
    """Spans are widened to bfloat16, in which modules here do not round."""
    model = lively(ONE).eval()
    prepared, lengths = prepare(model, tier), [1, 5, 300, 590]
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(4, 600, ROWS.rank + ROWS.rotated, generator=generator)

    def filled(chosen: list[int]) -> CachePart:
        cache = cache_of("int8", len(chosen))
        for place, one in enumerate(chosen):
            cache.layers[0][place, : lengths[one]] = ROWS.stored(rows[one, : lengths[one]])
        return cache

    def inputs(chosen: list[int]) -> Inputs:
        ids_B1 = torch.tensor([[10 + one] for one in chosen])
        return Inputs(ids_B1, position_BS=torch.tensor([[lengths[one]] for one in chosen]))

    def stepped(chosen: list[int]) -> Tensor:
        return prepared.step(inputs(chosen), filled(chosen), COUNTS).logits

    together = stepped([0, 1, 2, 3])
    assert torch.equal(together, torch.cat([stepped([one]) for one in range(4)]))
    with torch.inference_mode():
        right = model(inputs([0, 1, 2, 3]), cache=filled([0, 1, 2, 3]), options=COUNTS).logits
    assert error(together, right) < 1e-2
