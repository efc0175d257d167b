"""Parts of a prompt, read by the native kernels, give what the modules give for the whole of it.

Legend: S tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilium.config.attention import GQA, MLA
from consilium.config.model import Model
from consilium.config.moe import MoE
from consilium.config.router import Raw, Router, TopK
from consilium.kv.build import build_cache
from consilium.kv.types import Cache
from consilium.model.decoder import Decoder
from consilium.model.native import NativeDecoder
from consilium.model.packing import pack
from consilium.model.types import Inputs, Options, Output
from consilium.moe.types import Mode, Override
from consilium.ops.native.compile import Tier
from consilium.ops.weights import PACKINGS, Packing
from consilium.recipes import catalogue
from kernels import HERE, round_activations
from model.test_model_native import ATTENTION, COUNTS, ROUTERS, UNKNOWN, Paged, error, moe, prepare
from small import DEEPSEEK, DENSE, KINDS, SWITCH, lively

CONFIGS = KINDS | {name: dataclasses.replace(DENSE, attention=found) for name, found in ATTENTION.items()}
PARTS = [[75], [1, 3, 20, 51], [33, 42], [2, 5, 4, 6]]


def ids_of(length: int, seed: int = 0) -> Tensor:
    return torch.randint(300, (1, length), generator=torch.Generator().manual_seed(seed))


def read(
    prepared: NativeDecoder, ids_1S: Tensor, parts: Sequence[int], cache: Cache, options: Options = COUNTS
) -> Output:
    """What is said after the last part."""
    first, output = 0, None
    for length in parts:
        position_1S = torch.arange(first, first + length)[None]
        output = prepared.read(
            Inputs(ids_1S[:, first : first + length], position_BS=position_1S), cache, options
        )
        first += length
    assert output is not None
    return output


def wide_twin(model: Decoder) -> Decoder:
    wide = lively(model.config).eval()
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    return wide


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parts_give_what_the_whole_gives(config: Model, dtype: torch.dtype, tier: Tier) -> None:
    model = lively(config).to(dtype).eval()
    prepared, right = prepare(model, tier), wide_twin(model)
    rounds = tier in ("avx512bf16", "amx") and dtype == torch.bfloat16
    for parts in PARTS:
        cache = build_cache(config, batch=1, capacity=75, dtype=torch.float32)
        ids_1S = ids_of(sum(parts))
        with torch.inference_mode():
            found, expected = read(prepared, ids_1S, parts, cache), right(ids_1S).logits[:, -1:]
        assert error(found.logits, expected) < (1e-2 if rounds else 1e-5)


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_cached_rows_in_bfloat16_are_read_as_they_are(config: Model, tier: Tier) -> None:
    model = lively(config).bfloat16().eval()
    prepared, right = prepare(model, tier), wide_twin(model)
    cache = build_cache(config, batch=1, capacity=75, dtype=torch.bfloat16)
    with torch.inference_mode():
        found = read(prepared, ids_of(75), [40, 35], cache)
        assert error(found.logits, right(ids_of(75)).logits[:, -1:]) < 3e-2


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("packing", [None, *PACKINGS])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_where_a_prompt_is_cut_changes_no_bit(config: Model, packing: Packing | None, tier: Tier) -> None:
    """However few tokens a part has, or an expert of a part."""
    model = lively(config).bfloat16().eval()
    if packing is not None:
        pack(model, packing)
    prepared, ids_1S = prepare(model, tier), ids_of(75)
    with torch.inference_mode():
        found = [
            read(prepared, ids_1S, parts, build_cache(config, batch=1, capacity=75, dtype=torch.bfloat16))
            for parts in ([75], [1, 3, 20, 51], [33, 42], [70, 5], [64, 11])
        ]
    for other in found[1:]:
        assert torch.equal(other.logits, found[0].logits)


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_packed_weights_read_prompts(
    config: Model, packing: Packing, tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations are rounded where a product has few of them, by VNNI in every one, by tiles to bfloat16."""
    if tier in ("avx512", "avx512bf16"):
        round_activations(monkeypatch)
    model = lively(config).eval()
    pack(model, packing)
    prepared = prepare(model, tier)
    for parts in PARTS:
        cache = build_cache(config, batch=1, capacity=75, dtype=torch.float32)
        ids_1S = ids_of(sum(parts))
        with torch.inference_mode():
            found, right = read(prepared, ids_1S, parts, cache), model(ids_1S).logits[:, -1:]
        assert error(found.logits, right) < 3e-2


@pytest.mark.parametrize("system", [name for name in catalogue.names() if name not in UNKNOWN])
def test_every_system_reads_as_its_modules_do(system: str) -> None:
    model = lively(catalogue.recipe(system, "tiny")).eval()
    ids_1S, causal = ids_of(40), model.config.moe is None or model.config.moe.causal
    prepared, parts = prepare(model, HERE[-1]), [25, 15] if causal else [40]
    assert not prepared.reads_prompts, "it is in float32"
    narrow = lively(model.config).bfloat16()
    assert prepare(narrow, HERE[-1]).reads_prompts == causal
    cache = build_cache(model.config, batch=1, capacity=40, dtype=torch.float32)
    with torch.inference_mode():
        found, right = read(prepared, ids_1S, parts, cache), model(ids_1S).logits[:, -1:]
    assert error(found.logits, right) < 1e-5


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_loads_are_those_of_the_router(router: Router) -> None:
    model = lively(moe(router=router)).eval()
    ids_1S = ids_of(50)
    cache = build_cache(model.config, batch=1, capacity=50, dtype=torch.float32)
    with torch.inference_mode():
        found, right = read(prepare(model, HERE[-1]), ids_1S, [50], cache), model(ids_1S, options=COUNTS)
    assert error(found.logits, right.logits[:, -1:]) < 1e-5
    for layer, report in right.reports.items():
        assert torch.equal(found.reports[layer].load_E, report.load_E)
        assert int(found.reports[layer].tokens) == 50


def test_an_override_is_obeyed() -> None:
    model = lively(DEEPSEEK).eval()
    mute_TE = torch.zeros(1, 8, dtype=torch.bool)
    mute_TE[0, ::2] = True
    options = Options(mode=Mode(counts_only=True, override=Override(mute_TE=mute_TE)))
    cache = build_cache(model.config, batch=1, capacity=30, dtype=torch.float32)
    found = read(prepare(model, HERE[-1]), ids_of(30), [30], cache, options)
    for report in found.reports.values():
        assert int(report.load_E[::2].sum()) == 0 < int(report.load_E.sum())


@settings(max_examples=12)
@given(
    hidden=st.integers(1, 75),
    width=st.integers(1, 70),
    experts=st.integers(1, 9),
    parts=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    latent=st.booleans(),
)
def test_awkward_sizes_agree(hidden: int, width: int, experts: int, parts: list[int], latent: bool) -> None:
    attention = (
        MLA(
            heads=3,
            q_rank=None,
            kv_rank=1 + hidden % 33,
            nope_dim=hidden % 7,
            rope_dim=2 * (1 + width % 5),
            v_dim=1 + width % 17,
        )
        if latent
        else GQA(heads=3, kv_heads=1, head_dim=2 * (1 + hidden % 9))
    )
    layer = MoE(experts=experts, width=width, router=Router(select=TopK(k=1 + width % experts), weight=Raw()))
    config = dataclasses.replace(
        DENSE, hidden_size=hidden, attention=attention, moe=layer, dense=None, max_length=1024
    )
    model = lively(config).eval()
    length = sum(parts)
    cache = build_cache(config, batch=1, capacity=length, dtype=torch.float32)
    with torch.inference_mode():
        found = read(prepare(model, HERE[-1]), ids_of(length), parts, cache)
        assert error(found.logits, model(ids_of(length)).logits[:, -1:]) < 1e-5


@pytest.mark.parametrize("page", [1, 7, 256])
@pytest.mark.parametrize("config", [DEEPSEEK, SWITCH], ids=["latent", "grouped"])
def test_pages_change_no_bit(config: Model, page: int) -> None:
    """Slots beyond the prompt are not read: they are NaN here."""
    config = dataclasses.replace(config, layers=1, max_length=1024)
    prepared = prepare(lively(config).bfloat16(), HERE[-1])
    dense = build_cache(config, batch=1, capacity=600, dtype=torch.float32)
    paged = Paged(1, 600, page, config.attention.cache_width)
    found, right = (read(prepared, ids_of(550), [512, 38], cache).logits for cache in (paged, dense))
    assert torch.equal(found, right)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_no_bit_depends_on_the_threads(threads: int) -> None:
    model = lively(DEEPSEEK).bfloat16().eval()
    prepared, before = prepare(model, HERE[-1]), torch.get_num_threads()

    def logits() -> Tensor:
        cache = build_cache(model.config, batch=1, capacity=100, dtype=torch.bfloat16)
        return read(prepared, ids_of(100), [64, 36], cache).logits

    expected = logits()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(logits(), expected)
    finally:
        torch.set_num_threads(before)
