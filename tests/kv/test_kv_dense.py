from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.config.attention import GQA, MLA
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.errors import ConsiliumError
from consilium.kv.build import build_cache
from consilium.kv.dense import DenseCache, DenseLayer
from consilium.kv.types import View


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def extended(layer: DenseLayer, position: Tensor, new: Tensor, keys: int) -> Tensor:
    """Write, then read the first slots as a pass does."""
    view = layer.view(keys)
    layer.write(new, position)
    (rows_BLC,) = view.tiles(new.dtype)
    return rows_BLC


def model(attention: GQA | MLA) -> Model:
    return Model(
        family="llama",
        vocab_size=11,
        hidden_size=8,
        layers=3,
        attention=attention,
        dense=FeedForward(width=16),
    )


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=6), st.integers(1, 3))
def test_every_slot_holds_what_was_written_to_it_last(writes: list[tuple[int, int]], batch: int) -> None:
    """Sequence b writes one slot later than sequence b - 1, as sequences of different lengths do."""
    layer = DenseCache(layers=1, batch=batch, capacity=12, width=2).layer(0)
    expected: dict[tuple[int, int], Tensor] = {}
    for step, (start, tokens) in enumerate(writes):
        position = start + torch.arange(tokens) + torch.arange(batch)[:, None]
        new, keys = rows(batch, tokens, 2, seed=step), int(position.max()) + 1
        returned = extended(layer, position, new, keys)
        expected |= {(b, int(position[b, s])): new[b, s] for b in range(batch) for s in range(tokens)}
        assert returned.shape == (batch, keys, 2)
        for (b, slot), row in expected.items():
            if slot < keys:
                assert torch.equal(returned[b, slot], row)


def test_slots_never_written_are_finite() -> None:
    layer = DenseCache(layers=2, batch=2, capacity=6, width=3).layer(1)
    returned = extended(layer, torch.tensor([[5], [0]]), rows(2, 1, 3), 6)
    assert not returned[0, :5].any()
    assert not returned[1, 1:].any()


def test_layers_do_not_share_slots() -> None:
    cache = DenseCache(layers=2, batch=1, capacity=2, width=3)
    position = torch.tensor([[0]])
    first, second = rows(1, 1, 3, seed=1), rows(1, 1, 3, seed=2)
    extended(cache.layer(0), position, first, 1)
    extended(cache.layer(1), position, second, 1)
    assert torch.equal(extended(cache.layer(0), torch.tensor([[1]]), second, 2)[:, :1], first)


def test_rows_are_stored_in_the_dtype_of_the_cache_and_returned_in_that_of_the_pass() -> None:
    cache = DenseCache(layers=1, batch=1, capacity=4, width=3, dtype=torch.bfloat16)
    new = rows(1, 4, 3)
    returned = extended(cache.layer(0), torch.arange(4)[None], new, 4)
    assert returned.dtype == torch.float32
    assert torch.equal(returned, new.bfloat16().float())


def test_rows_carry_no_gradient() -> None:
    cache = DenseCache(layers=1, batch=1, capacity=2, width=3)
    new = rows(1, 1, 3).requires_grad_()
    assert not extended(cache.layer(0), torch.tensor([[0]]), new, 1).requires_grad


def test_a_full_cache_says_what_is_missing() -> None:
    layer = DenseCache(layers=1, batch=1, capacity=4, width=2).layer(0)
    position = torch.arange(4)[None]
    extended(layer, position, rows(1, 4, 2), 4)
    with pytest.raises(
        ConsiliumError, match="needs 5 slots but the cache was allocated with 4; ask for fewer"
    ):
        extended(layer, position[:, -1:] + 1, rows(1, 1, 2), 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("attention", "width"),
    [
        (GQA(heads=4, kv_heads=2, head_dim=6), 24),
        (MLA(heads=4, q_rank=None, kv_rank=10, nope_dim=6, rope_dim=4, v_dim=5), 14),
    ],
    ids=["gqa", "mla"],
)
def test_memory_is_what_the_config_promises(attention: GQA | MLA, width: int, dtype: torch.dtype) -> None:
    config = model(attention)
    cache = build_cache(config, batch=5, capacity=7, dtype=dtype)
    assert config.attention.cache_width == width
    assert cache.bytes == width * config.layers * 5 * 7 * dtype.itemsize
    assert len([cache.layer(i) for i in range(config.layers)]) == config.layers


@given(size=st.integers(1, 5), slots=st.integers(1, 11), batch=st.integers(1, 3))
def test_tiles_of_pages_are_the_slots_in_order(size: int, slots: int, batch: int) -> None:
    pages = -(-11 // size)
    table = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0)).view(batch, pages)
    storage = rows(batch * pages, size, 2)
    tiles = View(storage, table, slots).tiles(torch.float32)
    assert [tile.shape[1] for tile in tiles] == [min(size, slots - at) for at in range(0, slots, size)]
    expected = [
        [storage[table[b, slot // size], slot % size].tolist() for slot in range(slots)] for b in range(batch)
    ]
    assert torch.cat(tiles, 1).tolist() == expected
