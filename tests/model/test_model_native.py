"""A step of decoding by the native kernels has the values of the modules, in every tier and for every system.

Legend: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilium.config.attention import GQA, MLA, Rope
from consilium.config.balance import Balance
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.config.moe import MoE, SigmoidGated
from consilium.config.router import (
    Groups,
    LinearGate,
    Normalised,
    Raw,
    Router,
    Sigmoid,
    Softmax,
    SoftmaxOfSelected,
    TopK,
)
from consilium.kv.build import build_cache
from consilium.kv.paged import PagedLayer
from consilium.kv.rows import Plain
from consilium.kv.types import View
from consilium.model import native
from consilium.model.decoder import Decoder
from consilium.model.native import NativeDecoder
from consilium.model.types import Inputs, Options, Output
from consilium.moe.types import Mode, Override
from consilium.ops.native.compile import Tier
from consilium.recipes import catalogue
from kernels import HERE, kernels_of
from small import DEEPSEEK, DENSE, KINDS, SWITCH, WINDOWED, lively

COUNTS = Options(mode=Mode(counts_only=True))
UNKNOWN = {"latent-moe"}
"""Systems whose experts are behind a projection, which the kernels do not read."""


def prepare(model: Decoder, tier: Tier) -> NativeDecoder:
    with pytest.MonkeyPatch.context() as patch:
        found = kernels_of(tier)
        patch.setattr(native, "kernels", lambda: found)
        prepared = NativeDecoder.of(model.eval())
    assert prepared is not None, "the kernels read every part of this model"
    return prepared


@torch.inference_mode()
def both(
    model: Decoder, prepared: NativeDecoder, lengths: list[int], steps: int = 3
) -> list[tuple[Output, Output]]:
    """What modules and kernels say of the same steps behind prompts of these lengths."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids_BS = torch.randint(model.config.vocab_size, (len(lengths), max(lengths) + steps), generator=generator)
    found = []
    for step_of in (lambda i, c: model(i, cache=c, options=COUNTS), lambda i, c: prepared.step(i, c, COUNTS)):
        cache = build_cache(
            model.config, batch=len(lengths), capacity=max(lengths) + steps, dtype=model.dtype
        )
        model(Inputs(ids_BS[:, : max(lengths)]), cache=cache, options=COUNTS)
        position_B1 = torch.tensor(lengths)[:, None]
        found.append(
            [
                step_of(Inputs(ids_BS.gather(1, position_B1 + i), position_BS=position_B1 + i), cache)
                for i in range(steps)
            ]
        )
    return list(zip(*found, strict=True))


def error(found: Tensor, right: Tensor) -> float:
    return ((found.double() - right.double()).norm() / right.double().norm()).item()


def agree(model: Decoder, prepared: NativeDecoder, lengths: list[int], within: float = 1e-5) -> None:
    for right, found in both(model, prepared, lengths):
        assert error(found.logits, right.logits) < within
        assert found.reports.keys() == right.reports.keys()
        for layer, report in right.reports.items():
            assert torch.equal(found.reports[layer].load_E, report.load_E)
            assert torch.equal(found.reports[layer].wanted_E, report.wanted_E)
            assert int(found.reports[layer].tokens) == int(report.tokens)


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("lengths", [[1], [7, 2, 5], [3, 3, 3, 3, 3]], ids=str)
def test_kernels_agree_with_modules(config: Model, lengths: list[int], tier: Tier) -> None:
    model = lively(config).eval()
    agree(model, prepare(model, tier), lengths)


@pytest.mark.parametrize("system", [name for name in catalogue.names() if name not in UNKNOWN])
def test_every_system_decodes_as_its_modules_do(system: str) -> None:
    model = lively(catalogue.recipe(system, "tiny")).eval()
    agree(model, prepare(model, HERE[-1]), [4, 2])


@pytest.mark.parametrize("system", sorted(UNKNOWN))
def test_what_kernels_do_not_read_is_left_to_the_modules(
    system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kernels_of(HERE[-1])
    monkeypatch.setattr(native, "kernels", lambda: found)
    assert NativeDecoder.of(lively(catalogue.recipe(system, "tiny"))) is None
    assert NativeDecoder.of(lively(DENSE).double()) is None, "kernels read float32 and bfloat16"


def test_without_kernels_there_is_nothing_to_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", lambda: None)
    assert NativeDecoder.of(lively(DENSE)) is None


def moe(**changes: object) -> Model:
    assert DEEPSEEK.moe is not None
    changes = {"balance": Balance(), **changes}
    return dataclasses.replace(DEEPSEEK, moe=dataclasses.replace(DEEPSEEK.moe, **changes))


ROUTERS = {
    "softmax, raw": Router(score=Softmax(), select=TopK(k=3), weight=Raw(), scale=1.5),
    "softmax, normalised, biased gate": Router(projection=LinearGate(bias=True), select=TopK(k=8)),
    "softmax of selected": Router(select=TopK(k=2), weight=SoftmaxOfSelected()),
    "best of groups": Router(
        select=TopK(k=3, groups=Groups(count=4, keep=2, score="max")), weight=Normalised()
    ),
    "sigmoid, shifted": Router(score=Sigmoid(), offset="scores", select=TopK(k=1), weight=Raw()),
    "logits shifted": Router(score=Sigmoid(), offset="logits", select=TopK(k=2)),
    "weight on input": Router(select=TopK(k=2), weight_on="input"),
}


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_kernels_route_as_the_router_does(router: Router) -> None:
    """Those that the kernels do not know are asked in between."""
    model = lively(moe(router=router)).eval()
    prepared = prepare(model, HERE[-1])
    known = router.offset != "logits" and router.weight_on == "output"
    assert [bool(layer.routed) for layer in prepared.blocks.layers] == [False, known, known]
    agree(model, prepared, [5, 1, 9])


ATTENTION = {
    "no query rank": dataclasses.replace(DEEPSEEK.attention, q_rank=None),
    "biased, no norm, halves": MLA(
        heads=5,
        q_rank=16,
        kv_rank=20,
        nope_dim=6,
        rope_dim=4,
        v_dim=10,
        kv_norm="none",
        qkv_bias=True,
        rope=Rope(),
    ),
    "keys of position alone": MLA(heads=3, q_rank=None, kv_rank=9, nope_dim=0, rope_dim=8, v_dim=7),
    "softcap, part rotated": GQA(heads=6, kv_heads=2, head_dim=10, softcap=2.0, rope=Rope(fraction=0.6)),
    "norm over all heads": GQA(heads=4, kv_heads=4, head_dim=6, qk_norm="full", scale=0.7),
    "window": GQA(heads=4, kv_heads=2, head_dim=6, window=4),
    "window in one layer, softcap": GQA(
        heads=6, kv_heads=2, head_dim=10, window=9, full_layers=(0,), softcap=2.0, rope=Rope(fraction=0.6)
    ),
    "one head of keys, pairs": GQA(
        heads=7, kv_heads=1, head_dim=12, qkv_bias=True, rope=Rope(interleaved=True)
    ),
}


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION)
def test_kernels_attend_as_attention_does(attention: GQA | MLA, tier: Tier) -> None:
    model = lively(dataclasses.replace(DENSE, attention=attention)).eval()
    agree(model, prepare(model, tier), [6, 1, 11])


ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu", "squared_relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_compute_every_activation(activation: str) -> None:
    config = moe(activation=activation, width=17, shared=SigmoidGated(width=13))
    dense = FeedForward(width=31, activation=activation)
    model = lively(dataclasses.replace(config, dense=dense)).eval()
    agree(model, prepare(model, HERE[-1]), [3, 8])


@settings(max_examples=12)
@given(
    hidden=st.integers(1, 75),
    width=st.integers(1, 70),
    experts=st.integers(1, 9),
    k=st.integers(1, 9),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=7),
)
def test_awkward_sizes_agree(hidden: int, width: int, experts: int, k: int, lengths: list[int]) -> None:
    attention = GQA(heads=3, kv_heads=1, head_dim=2 * (1 + hidden % 9))
    layer = MoE(experts=experts, width=width, router=Router(select=TopK(k=min(k, experts)), weight=Raw()))
    config = dataclasses.replace(
        DENSE, hidden_size=hidden, attention=attention, moe=layer, dense=None, max_length=512
    )
    model = lively(config).eval()
    agree(model, prepare(model, HERE[-1]), lengths)


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_bfloat16_weights_give_what_they_give_in_float32(config: Model, tier: Tier) -> None:
    """With cached rows in float32 nothing is rounded."""
    model = lively(config).to(torch.bfloat16).eval()
    wide = lively(config).eval()
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    prepared = prepare(model, tier)
    ids_BS = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cache = build_cache(config, batch=2, capacity=12, dtype=torch.float32)
        steps = [
            prepared.step(
                Inputs(ids_BS[:, i : i + 1], position_BS=torch.full((2, 1), i)), cache, COUNTS
            ).logits
            for i in range(12)
        ]
        right = wide(ids_BS).logits
    assert error(torch.cat(steps, dim=1), right) < (1e-2 if tier == "amx" else 1e-5)


MANY_HEADS = {
    "twenty heads": MLA(heads=20, q_rank=None, kv_rank=40, nope_dim=6, rope_dim=24, v_dim=10),
    "nineteen of one key": GQA(heads=38, kv_heads=2, head_dim=18),
}


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("attention", (ATTENTION | MANY_HEADS).values(), ids=ATTENTION | MANY_HEADS)
def test_cached_rows_in_bfloat16_are_read_as_they_are(attention: GQA | MLA, tier: Tier) -> None:
    """Rows and weights are given, so that only what attention rounds makes a difference."""
    model = lively(dataclasses.replace(DENSE, attention=attention, max_length=1024)).eval()
    prepared, lengths = prepare(model, tier), [0, 15, 300, 530]
    generator = torch.Generator().manual_seed(1)
    caches = [build_cache(model.config, batch=4, capacity=600, dtype=torch.bfloat16) for _ in range(2)]
    for layer in range(model.config.layers):
        rows = torch.randn(4, 600, attention.cache_width, generator=generator)
        for cache in caches:
            cache.layer(layer).write(rows, torch.arange(600).expand(4, -1))
    inputs = Inputs(torch.tensor([[1], [2], [3], [4]]), position_BS=torch.tensor(lengths)[:, None])
    with torch.inference_mode():
        found = prepared.step(inputs, caches[0], COUNTS).logits
        right = model(inputs, cache=caches[1], options=COUNTS).logits
    assert error(found, right) < (1e-2 if tier in ("avx512bf16", "amx") else 1e-5)


@pytest.mark.parametrize("config", [*KINDS.values(), WINDOWED], ids=[*KINDS, "windowed"])
@settings(max_examples=6)
@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=9), threads=st.integers(1, 3))
def test_no_bit_depends_on_the_company_or_the_threads(
    config: Model, lengths: list[int], threads: int
) -> None:
    model = lively(config).eval()
    prepared = prepare(model, HERE[-1])
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(1, n + 1, config.attention.cache_width, generator=generator) for n in lengths]
    ids_B1 = torch.randint(300, (len(lengths), 1), generator=generator)

    def step(chosen: list[int]) -> Tensor:
        cache = build_cache(config, batch=len(chosen), capacity=max(lengths) + 1, dtype=torch.float32)
        for layer in range(config.layers):
            for place, one in enumerate(chosen):
                PagedLayer(cache.layers[layer][place : place + 1], cache.rows, None).write(
                    rows[one] * (1 + layer), torch.arange(lengths[one] + 1)[None]
                )
        position_B1 = torch.tensor([[lengths[one]] for one in chosen])
        return prepared.step(Inputs(ids_B1[chosen], position_BS=position_B1), cache, COUNTS).logits

    before = torch.get_num_threads()
    alone = torch.cat([step([one]) for one in range(len(lengths))])
    try:
        torch.set_num_threads(threads)
        together = step(list(range(len(lengths))))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, alone)


class Paged:
    """Pages in a shuffled order, with NaN wherever no row was written."""

    def __init__(
        self, batch: int, capacity: int, page: int, width: int, dtype: torch.dtype = torch.float32
    ) -> None:
        pages = -(-capacity // page)
        order = torch.randperm(batch * pages + 2, generator=torch.Generator().manual_seed(0))
        self.storage_NPC = torch.full((batch * pages + 2, page, width), torch.nan, dtype=dtype)
        self.table_BM = order[: batch * pages].view(batch, pages)

    def layer(self, index: int) -> Paged:
        return self

    def write(self, new_BSC: Tensor, slots_BS: Tensor) -> None:
        size = self.storage_NPC.shape[1]
        self.storage_NPC[self.table_BM.gather(1, slots_BS // size), slots_BS % size] = new_BSC

    def view(self, slots: int) -> View:
        return View(
            self.storage_NPC, self.table_BM, Plain(self.storage_NPC.shape[-1], self.storage_NPC.dtype), slots
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page", [1, 3, 16, 256, 300])
@pytest.mark.parametrize("config", [DEEPSEEK, SWITCH], ids=["latent", "grouped"])
def test_pages_change_no_bit(config: Model, page: int, dtype: torch.dtype) -> None:
    """Slots beyond a sequence's own are not read: they are NaN here."""
    config = dataclasses.replace(config, layers=1, max_length=1024)
    prepared = prepare(lively(config), HERE[-1])
    lengths, generator = [0, 5, 700], torch.Generator().manual_seed(2)
    dense = build_cache(config, batch=3, capacity=701, dtype=dtype)
    paged = Paged(3, 701, page, config.attention.cache_width, dtype)
    for place, length in enumerate(lengths):
        rows = torch.randn(1, length, config.attention.cache_width, generator=generator).to(dtype)
        dense.layers[0][place, :length] = rows[0]
        paged.storage_NPC[
            paged.table_BM[place, torch.arange(length) // page], torch.arange(length) % page
        ] = rows[0]
    inputs = Inputs(torch.tensor([[1], [2], [3]]), position_BS=torch.tensor(lengths)[:, None])
    found, right = (prepared.step(inputs, cache, COUNTS).logits for cache in (paged, dense))
    assert torch.equal(found, right)
    assert torch.isfinite(found).all()


def test_an_override_is_obeyed() -> None:
    model = lively(DEEPSEEK).eval()
    prepared = prepare(model, HERE[-1])
    mute_TE = torch.zeros(1, 8, dtype=torch.bool)
    mute_TE[0, ::2] = True
    options = Options(mode=Mode(counts_only=True, override=Override(mute_TE=mute_TE)))
    cache = build_cache(model.config, batch=2, capacity=2, dtype=torch.float32)
    inputs = Inputs(torch.tensor([[4], [5]]), position_BS=torch.zeros(2, 1, dtype=torch.int64))
    found = prepared.step(inputs, cache, options)
    right = model(inputs, options=options)
    assert error(found.logits, right.logits) < 1e-5
    for report in found.reports.values():
        assert int(report.load_E[::2].sum()) == 0 < int(report.load_E.sum())


def test_equal_experts_go_to_the_lowest_index() -> None:
    model = lively(moe(router=Router(select=TopK(k=3), weight=Raw()))).eval()
    with torch.no_grad():
        for layer in model.moe_modules().values():
            weight = next(iter(layer.router.parameters()))
            weight.copy_(weight[:1].expand_as(weight))
    prepared = prepare(model, HERE[-1])
    for right, found in both(model, prepared, [3, 3, 1]):
        for layer, report in found.reports.items():
            assert torch.equal(report.load_E, right.reports[layer].load_E)
            assert report.load_E.tolist() == [3, 3, 3, 0, 0, 0, 0, 0]


def test_first_tokens_need_no_positions() -> None:
    """Positions that are not given are one row that stands for all."""
    model = lively(DEEPSEEK).eval()
    inputs = Inputs(torch.tensor([[4], [5], [6]]))
    cache = build_cache(model.config, batch=3, capacity=1, dtype=torch.float32)
    found = prepare(model, HERE[-1]).step(inputs, cache, COUNTS)
    assert error(found.logits, model(inputs, options=COUNTS).logits) < 1e-5


def test_weights_that_change_in_place_count() -> None:
    model = lively(DENSE).eval()
    prepared = prepare(model, HERE[-1])
    (before,) = both(model, prepared, [2], steps=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    (after,) = both(model, prepared, [2], steps=1)
    assert error(after[1].logits, after[0].logits) < 1e-5
    assert error(after[1].logits, before[1].logits) > 1e-2
