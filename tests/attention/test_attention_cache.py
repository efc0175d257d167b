"""A pass on a cache equals a pass without one, however the tokens arrive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attention.cases import CONFIGS, YARN, built, cached, counted, empty_layer, random_x, uncached
from consilium.attention.context import build_context
from consilium.attention.mla import LatentAttention
from consilium.attention.types import LatentPath
from consilium.config.attention import GQA, MLA
from consilium.kv.rows import Plain
from consilium.kv.types import View
from consilium.ops import sight
from consilium.ops.attention import attend
from support import relative_error

named_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())

ROWS = Plain(0, torch.float32)
REALISTIC = MLA(heads=4, q_rank=None, kv_rank=24, nope_dim=16, rope_dim=8, v_dim=12, rope=YARN)


@named_configs
def test_a_prompt_then_single_tokens_equals_one_pass(config: GQA | MLA) -> None:
    module, x = built(config), random_x(2, 11)
    layer = empty_layer(config, 2, 11)
    pieces = [cached(module, x[:, :5], counted(2, 5), layer)]
    pieces += [cached(module, x[:, at : at + 1], counted(2, 1, at), layer) for at in range(5, 11)]
    assert relative_error(torch.cat(pieces, 1), uncached(module, x)) < 1e-5


@given(
    config=st.sampled_from(list(CONFIGS.values())),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    batch=st.integers(1, 2),
    path=st.sampled_from(["auto", "expanded", "absorbed"]),
)
def test_any_cut_into_chunks_equals_one_pass(
    config: GQA | MLA, lengths: list[int], batch: int, path: LatentPath
) -> None:
    module, x = built(config), random_x(batch, sum(lengths))
    layer = empty_layer(config, batch, sum(lengths) + 3)
    pieces, start = [], 0
    for chunk in x.split(lengths, 1):
        position = counted(batch, chunk.shape[1], start)
        context = replace(build_context(config, position, cached=True), latent_path=path)
        pieces.append(module(chunk, context, layer).y_BSD)
        start += chunk.shape[1]
    assert relative_error(torch.cat(pieces, 1), uncached(module, x)) < 1e-5


@named_configs
@pytest.mark.parametrize("garbage", [0.0, 1e4])
def test_a_ragged_batch_equals_one_by_one(config: GQA | MLA, garbage: float) -> None:
    """Right-padded prompts, then decoding at different lengths, in slots where anything finite may stand."""
    module, lengths, new = built(config), torch.tensor([3, 7, 1]), 4
    x = random_x(3, 7 + new)
    layer = empty_layer(config, 3, 7 + new)
    layer.write(torch.full((3, 7 + new, config.cache_width), garbage), counted(3, 7 + new))
    padded = torch.where(counted(3, 7)[..., None] < lengths[:, None, None], x[:, :7], 50.0)
    prompt = cached(module, padded, counted(3, 7), layer)
    steps = [
        cached(module, x[torch.arange(3), lengths + i][:, None], (lengths + i)[:, None], layer)
        for i in range(new)
    ]
    for b, length in enumerate(lengths.tolist()):
        alone = uncached(module, x[b : b + 1, : length + new])[0]
        assert relative_error(prompt[b, :length], alone[:length]) < 1e-5
        assert relative_error(torch.stack([step[b, 0] for step in steps]), alone[length:]) < 1e-5


@pytest.mark.parametrize("q_rank", [None, 14])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("position", [0, 100, 5000])
def test_absorbed_equals_expanded_far_into_a_sequence(position: int, tokens: int, q_rank: int | None) -> None:
    config = replace(REALISTIC, q_rank=q_rank)
    module = built(config)
    layer = empty_layer(config, 1, position + tokens)
    with torch.no_grad():
        if position:
            cached(module, random_x(1, position), counted(1, position), layer)
        context = build_context(config, counted(1, tokens, position), cached=True)
        x = random_x(1, tokens, seed=1)
        expanded, absorbed = (
            module(x, replace(context, latent_path=path), layer).y_BSD for path in ("expanded", "absorbed")
        )
    assert expanded.norm() > 0.01 * x.norm()
    assert relative_error(absorbed, expanded) < 1e-5


@pytest.mark.parametrize("path", ["expanded", "absorbed"])
def test_no_weight_is_read_past_its_module(path: LatentPath) -> None:
    """As where it is sharded: each weight is whole while its own module runs, and gone otherwise."""
    module, x, layer = built(REALISTIC), random_x(1, 4), empty_layer(REALISTIC, 1, 4)
    context = replace(build_context(REALISTIC, counted(1, 4), cached=True), latent_path=path)
    with torch.no_grad():
        whole = module(x, context, layer).y_BSD
        for part in module.children():
            kept = {name: p.clone() for name, p in part.named_parameters()}
            for p in part.parameters():
                p.fill_(torch.nan)
            part.register_forward_pre_hook(lambda part, _, kept=kept: _fill(part, kept))
            part.register_forward_hook(lambda part, _, y, kept=kept: _fill(part, dict.fromkeys(kept)))
        assert torch.equal(module(x, context, layer).y_BSD, whole)


def _fill(part: torch.nn.Module, values: Mapping[str, Tensor | None]) -> None:
    for name, value in values.items():
        part.get_parameter(name).copy_(torch.tensor(torch.nan) if value is None else value)


@pytest.mark.parametrize(
    ("start", "tokens", "has_cache", "absorbs"),
    [
        (50, 1, True, True),
        (50, 33, True, True),
        (50, 34, True, False),
        (0, 1, True, False),
        (0, 33, True, False),
        (0, 33, False, False),
    ],
)
def test_few_new_tokens_on_a_longer_cache_absorb(
    *, start: int, tokens: int, has_cache: bool, absorbs: bool
) -> None:
    """These widths break even at 24 (16 + 12) / ((2 * 24 + 8) - (16 + 8 + 12)) = 33.6 new tokens."""
    config = REALISTIC
    assert config.absorb_below == pytest.approx(33.6)
    module = built(config)
    assert isinstance(module, LatentAttention)
    context = build_context(config, counted(1, tokens, start), cached=has_cache)
    assert module._absorbs(context, cached=has_cache) is absorbs


def test_the_path_that_cost_prefers_is_the_path_that_runs() -> None:
    module = built(REALISTIC)
    layer = empty_layer(REALISTIC, 1, 41)
    cached(module, random_x(1, 40), counted(1, 40), layer)
    context = build_context(REALISTIC, counted(1, 1, 40), cached=True)
    x = random_x(1, 1, seed=1)
    auto, absorbed, expanded = (
        module(x, replace(context, latent_path=path), layer).y_BSD
        for path in ("auto", "absorbed", "expanded")
    )
    assert torch.equal(auto, absorbed)
    assert not torch.equal(auto, expanded)


@named_configs
def test_a_cached_row_has_the_width_the_config_promises(config: GQA | MLA) -> None:
    written: list[torch.Tensor] = []

    class Recorder:
        def write(self, new_BSC: torch.Tensor, slots_BS: torch.Tensor) -> None:
            written.append(new_BSC)

        def view(self, slots: int) -> View:
            return View(torch.zeros(2, slots, config.cache_width), None, ROWS, slots)

    built(config)(random_x(2, 3), build_context(config, counted(2, 3), cached=True), Recorder())
    assert [tuple(rows.shape) for rows in written] == [(2, 3, config.cache_width)]


class Pages:
    """A cache whose pages lie in any order, with strangers' rows between them."""

    def __init__(self, batch: int, capacity: int, width: int, size: int) -> None:
        pages = -(-capacity // size)
        order = torch.randperm(batch * pages + 3, generator=torch.Generator().manual_seed(size))
        self.table_BM = order[: batch * pages].view(batch, pages)
        self.storage_NPC = torch.full((len(order), size, width), 1e4)

    def write(self, new_BSC: torch.Tensor, slots_BS: torch.Tensor) -> None:
        size = self.storage_NPC.shape[1]
        self.storage_NPC[self.table_BM.gather(1, slots_BS // size), slots_BS % size] = new_BSC.detach()

    def view(self, slots: int) -> View:
        return View(self.storage_NPC, self.table_BM, ROWS, slots)


@named_configs
@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("path", ["expanded", "absorbed"])
def test_pages_equal_one_pass(config: GQA | MLA, size: int, path: LatentPath) -> None:
    """Ragged lengths over pages of several sizes, last pages partly filled."""
    module, lengths, new = built(config), torch.tensor([3, 7, 1]), 4
    x, pages = random_x(3, 7 + new), Pages(3, 7 + new, config.cache_width, size)

    def passed(part: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        context = replace(build_context(config, position, cached=True), latent_path=path)
        return module(part, context, pages).y_BSD

    prompt = passed(x[:, :7], counted(3, 7))
    rows = torch.arange(3)
    steps = [passed(x[rows, lengths + i][:, None], (lengths + i)[:, None]) for i in range(new)]
    for b, length in enumerate(lengths.tolist()):
        alone = uncached(module, x[b : b + 1, : length + new])[0]
        assert relative_error(prompt[b, :length], alone[:length]) < 1e-5
        assert relative_error(torch.stack([step[b, 0] for step in steps]), alone[length:]) < 1e-5


def test_a_long_prompt_on_a_cache_reads_a_window_in_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask of the whole text is made: the largest has a row a query of a stripe."""
    module, x = built(GQA(heads=2, kv_heads=1, head_dim=4, window=5)), random_x(1, 40)
    expected = uncached(module, x)
    sizes: list[int] = []

    def counting(*tensors: Tensor, mask_BSL: Tensor | None, scale: float, softcap: float | None) -> Tensor:
        sizes.append(0 if mask_BSL is None else mask_BSL.numel())
        return attend(*tensors, mask_BSL=mask_BSL, scale=scale, softcap=softcap)

    monkeypatch.setattr(sight, "STRIPE", 8)
    monkeypatch.setattr(sight, "attend", counting)
    found = cached(module, x, counted(1, 40), empty_layer(module.config, 1, 40))
    assert relative_error(found, expected) < 1e-5
    assert len(sizes) == 5
    assert max(sizes) == 8 * (8 + 4)
