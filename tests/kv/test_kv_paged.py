from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.config.attention import GQA, MLA
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.errors import ConsiliumError
from consilium.kv.build import build_pool
from consilium.kv.paged import CachePart, PagedCache, PagedLayer
from consilium.kv.pages import Pages
from consilium.kv.prefixes import Prefixes, digests
from consilium.kv.rows import EightBits, Plain, rows_of
from consilium.kv.types import TILE, View


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def extended(layer: PagedLayer, position: Tensor, new: Tensor, keys: int) -> Tensor:
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


def sequences(batch: int, capacity: int, page: int, layers: int = 1, width: int = 2) -> CachePart:
    """Sequences whose pages lie in any order, or of a page each where that is as long as they are."""
    if page == capacity:
        return PagedCache(layers=layers, pages=batch, page=page, rows=Plain(width, torch.float32)).part()
    pages = -(-capacity // page)
    cache = PagedCache(layers=layers, pages=batch * pages + 1, page=page, rows=Plain(width, torch.float32))
    order = torch.randperm(batch * pages + 1, generator=torch.Generator().manual_seed(0))
    return cache.part(order[1:].view(batch, pages))


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=6),
    st.integers(1, 3),
    st.sampled_from([1, 3, 4, 12]),
)
def test_every_slot_holds_what_was_written_to_it_last(
    writes: list[tuple[int, int]], batch: int, page: int
) -> None:
    """Sequence b writes one slot later than sequence b - 1, as sequences of different lengths do."""
    layer = sequences(batch, 12, page).layer(0)
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


@pytest.mark.parametrize("page", [1, 4, 6])
def test_slots_never_written_are_finite(page: int) -> None:
    layer = sequences(2, 6, page, layers=2, width=3).layer(1)
    returned = extended(layer, torch.tensor([[5], [0]]), rows(2, 1, 3), 6)
    assert not returned[0, :5].any()
    assert not returned[1, 1:].any()


def test_layers_do_not_share_slots() -> None:
    cache = sequences(1, 2, 2, layers=2, width=3)
    position = torch.tensor([[0]])
    first, second = rows(1, 1, 3, seed=1), rows(1, 1, 3, seed=2)
    extended(cache.layer(0), position, first, 1)
    extended(cache.layer(1), position, second, 1)
    assert torch.equal(extended(cache.layer(0), torch.tensor([[1]]), second, 2)[:, :1], first)


def test_rows_are_stored_in_the_dtype_of_the_cache_and_returned_in_that_of_the_pass() -> None:
    cache = PagedCache(layers=1, pages=1, page=4, rows=Plain(3, torch.bfloat16)).part()
    new = rows(1, 4, 3)
    returned = extended(cache.layer(0), torch.arange(4)[None], new, 4)
    assert returned.dtype == torch.float32
    assert torch.equal(returned, new.bfloat16().float())


def test_rows_carry_no_gradient() -> None:
    cache = sequences(1, 2, 2, width=3)
    new = rows(1, 1, 3).requires_grad_()
    assert not extended(cache.layer(0), torch.tensor([[0]]), new, 1).requires_grad


@pytest.mark.parametrize("page", [2, 4])
def test_a_full_cache_says_what_is_missing(page: int) -> None:
    layer = sequences(1, 4, page).layer(0)
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
    cache = build_pool(config, pages=5, page=7, dtype=dtype)
    assert config.attention.cache_width == width
    assert cache.bytes == width * config.layers * 5 * 7 * dtype.itemsize
    assert len(cache.part().layers) == config.layers


@given(size=st.sampled_from([1, 5, 64, 300, 600]), slots=st.integers(1, 1100), batch=st.integers(1, 2))
def test_tiles_of_pages_are_the_slots_in_order(size: int, slots: int, batch: int) -> None:
    pages = -(-1100 // size)
    table = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0)).view(batch, pages)
    storage = rows(batch * pages, size, 1)
    tiles = View(storage, table, Plain(1, torch.float32), slots).tiles(torch.float32)
    together = size * max(1, TILE // size)
    assert [tile.shape[1] for tile in tiles] == [
        min(together, slots - at) for at in range(0, slots, together)
    ]
    slot_L = torch.arange(slots)
    assert torch.equal(torch.cat(tiles, 1), storage[table[:, slot_L // size], slot_L % size])


def test_a_pool_grows_and_keeps_what_it_holds() -> None:
    cache = PagedCache(layers=2, pages=0, page=4, rows=Plain(3, torch.float32))
    cache.grow(2)
    new = rows(1, 4, 3)
    extended(cache.part(torch.tensor([[1]])).layer(1), torch.arange(4)[None], new, 4)
    cache.grow(3)
    assert cache.pages == 5
    assert torch.equal(cache.part(torch.tensor([[1]])).layer(1).view(4).tiles(new.dtype)[0], new)
    cache.clear([1, 3])
    assert not cache.part().layers[1][[1, 3]].any()


@given(st.data())
def test_a_page_is_free_or_owned(data: st.DataObject) -> None:
    """Against a list of who owns what."""
    pages, owned = Pages(), list[list[int]]()
    pages.add(3)
    for _ in range(data.draw(st.integers(1, 20))):
        match data.draw(st.sampled_from(["add", "take", "share", "release"])):
            case "add":
                pages.add(data.draw(st.integers(0, 3)))
            case "take":
                owned.append(pages.take(data.draw(st.integers(0, pages.free))))
            case "share" if owned:
                pages.share(shared := data.draw(st.sampled_from(owned)))
                owned.append(shared)
            case "release" if owned:
                pages.release(owned.pop(data.draw(st.integers(0, len(owned) - 1))))
            case _:
                pass
        counts = Counter(page for some in owned for page in some)
        assert pages.free + len(counts) == pages.total
        assert all(pages.owned_once([page]) == (count == 1) for page, count in counts.items())


def test_digests_tell_prompts_apart_by_all_that_came_before() -> None:
    one, other = digests([1, 2, 3, 4, 5], 2), digests([9, 2, 3, 4, 5], 2)
    assert (len(one), len(set(one + other))) == (2, 4)
    assert digests([1, 2, 3, 4], 2) == one == digests([1, 2, 3, 4, 6, 7], 2)[:2]
    assert digests([1], 2) == () == digests([], 2)


def test_prefixes_are_found_shared_and_forgotten_from_their_ends() -> None:
    pages = Pages()
    pages.add(6)
    prefixes = Prefixes(pages)
    parts = digests(range(6), 2)
    row = pages.take(3)
    for part, page in zip(parts, row, strict=True):
        prefixes.keep(part, [page])
    prefixes.keep(parts[0], pages.take(1))  # computed twice at once: the first is kept
    assert prefixes.find((*parts[:2], b"other")) == row[:2]
    assert prefixes.find((b"other", *parts)) == []
    assert not prefixes.forget(), "all are read"
    pages.release(row)
    assert (prefixes.forget(), prefixes.pages) == (True, 2), "the third part, whose row has left"
    assert not prefixes.forget()
    pages.release(row[:2])
    assert prefixes.forget()
    assert prefixes.find(parts) == row[:1], "the second went before the first"
    assert (pages.free, pages.total) == (4, 6)


LATENT = MLA(heads=4, q_rank=None, kv_rank=40, nope_dim=6, rope_dim=4, v_dim=5)


@given(st.integers(0, 1000), st.sampled_from([1e-30, 1e-3, 1.0, 1e5]))
def test_latents_in_eight_bits_are_within_half_a_step(seed: int, size: float) -> None:
    kept = rows(2, 5, 44, seed=seed) * size
    kept[0, 0] = 0
    form = EightBits(40, 4)
    stored = form.stored(kept)
    assert (stored.dtype, stored.shape) == (torch.int8, (2, 5, 40 + 8 + 2))
    again = form.read(stored, torch.float32)
    largest = kept[..., :40].abs().amax(-1, keepdim=True)
    # Half a step, and what the scale loses in bfloat16 at the ends.
    assert ((again[..., :40] - kept[..., :40]).abs() <= largest * (0.5 / 127 + 2**-8) + 1e-38).all()
    assert torch.equal(again[..., 40:], kept[..., 40:].bfloat16().float())
    assert torch.equal(form.stored(again.bfloat16()), form.stored(form.read(stored, torch.bfloat16)))


def test_a_pool_of_eight_bits_takes_their_bytes_and_gives_rows_back() -> None:
    config = model(LATENT)
    pool = build_pool(config, pages=3, page=4, dtype=torch.bfloat16, form="int8")
    assert pool.bytes == config.layers * 3 * 4 * (40 + 2 * 4 + 2)
    new = rows(1, 6, 44)
    found = extended(pool.part(torch.tensor([[2, 0]])).layer(1), torch.arange(6)[None], new, 6)
    assert torch.equal(found, EightBits(40, 4).read(EightBits(40, 4).stored(new), torch.float32))


def test_eight_bits_are_for_latents() -> None:
    with pytest.raises(ConsiliumError, match=r"for latent attention.*leave --cache out"):
        rows_of(GQA(heads=4, kv_heads=2, head_dim=6), "int8", torch.bfloat16)
