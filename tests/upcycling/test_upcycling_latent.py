"""Grouped-query attention made latent: equal where nothing is left out, and as defined where something is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilium.attention.context import build_context
from consilium.checkpoint import store
from consilium.cli.main import main
from consilium.config.attention import GQA, MLA, Rope, Yarn
from consilium.config.model import MTP, Model
from consilium.config.upcycling import Latent
from consilium.engine.engine import Engine
from consilium.errors import ConsiliumError
from consilium.ops.rope import rotary_tables, rotate_naive
from consilium.planner.kv import values_per_token
from consilium.planner.latent import full_rank, widest, with_latent_attention
from consilium.upcycling.latent import Basis, basis_of, pairs, queries, turned, ups
from consilium.upcycling.run import upcycle
from small import lively
from support import relative_error
from upcycling.sources import LLAMA, QWEN3, saved, text

YARN = Yarn(factor=8.0, original_length=16, mscale=1.0, mscale_all_dim=0.0)
SOURCES: dict[str, GQA] = {
    "grouped": GQA(heads=4, kv_heads=2, head_dim=8),
    "three groups, odd sizes": GQA(heads=6, kv_heads=3, head_dim=10, rope=Rope(theta=77.0)),
    "multi-head": GQA(heads=3, kv_heads=3, head_dim=6, rope=Rope(interleaved=True)),
    "multi-query": GQA(heads=5, kv_heads=1, head_dim=8),
    "biases": GQA(heads=4, kv_heads=2, head_dim=8, qkv_bias=True),
    "YaRN": GQA(heads=4, kv_heads=2, head_dim=8, rope=Rope(theta=100.0, scaling=YARN)),
    "half rotated": GQA(heads=4, kv_heads=2, head_dim=8, rope=Rope(fraction=0.5, theta=50.0)),
    "a scale of its own": GQA(heads=4, kv_heads=4, head_dim=8, scale=0.7),
}


def with_attention(config: GQA) -> Model:
    return dataclasses.replace(LLAMA, attention=config)


def ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, 259, (batch, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SOURCES)
def test_full_rank_computes_what_its_source_does(name: str, tmp_path: Path) -> None:
    config = SOURCES[name]
    dense = saved(with_attention(config), tmp_path / "dense")
    made = upcycle(tmp_path / "dense", tmp_path / "mla", method="mla", data=text(tmp_path / "a.txt"))
    latent = store.load(tmp_path / "mla").eval()
    assert isinstance(latent.config.attention, MLA)
    assert latent.config.attention.cache_width == config.cache_width
    assert relative_error(latent(ids(2, 65)).logits, dense(ids(2, 65)).logits) < 1e-4
    assert made.promise == 1e-4
    assert made.kept
    assert max(found.relative for found in made.layers) < 1e-4


@pytest.mark.parametrize("name", SOURCES)
def test_it_answers_through_its_latent_cache_as_its_source_does(name: str, tmp_path: Path) -> None:
    """Decoding reads the latents themselves (absorbed); a prompt expands them."""
    dense = saved(with_attention(SOURCES[name]), tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "mla", method="mla", data=text(tmp_path / "a.txt"))
    prompts = [[5, 9, 200], [7] * 11]
    latent = store.load(tmp_path / "mla").eval()
    both = [Engine(model).complete(prompts, max_tokens=12) for model in (dense, latent)]
    assert both[0] == both[1]


def random_moments(config: GQA, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values [T, 2K] of some tokens, of which some directions are much larger, and their moments."""
    generator = torch.Generator().manual_seed(seed)
    width = 2 * config.kv_heads * config.head_dim
    mixed_XX = torch.randn(width, width, generator=generator, dtype=torch.float64)
    kv_TX = (torch.randn(50, width, generator=generator, dtype=torch.float64) ** 3) @ mixed_XX
    return kv_TX, kv_TX.T @ kv_TX


def made_of(config: GQA, **method: Any) -> MLA:
    attention = with_latent_attention(with_attention(config), Latent(**method)).attention
    assert isinstance(attention, MLA)
    return attention


shapes = st.builds(
    lambda group, kv_heads, halves, interleaved, fraction: GQA(
        heads=group * kv_heads,
        kv_heads=kv_heads,
        head_dim=4 * halves,
        rope=Rope(theta=30.0, interleaved=interleaved, fraction=fraction),
    ),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 4),
    halves=st.integers(1, 3),
    interleaved=st.booleans(),
    fraction=st.sampled_from([0.5, 1.0]),
)


@given(config=shapes, data=st.data())
@settings(max_examples=40)
def test_mixing_keys_of_all_heads_and_rotating_them_commute(config: GQA, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, config.kv_heads))
    made = made_of(config, rope_dim=kept * config.rotated_dim)
    kv_TX, moments_XX = random_moments(config)
    keys = config.kv_heads * config.head_dim
    turn_KK = turned(moments_XX[:keys, :keys], config, made)
    assert relative_error(turn_KK @ turn_KK.T, torch.eye(keys, dtype=torch.float64)) < 1e-12
    key_TK, position_1T = kv_TX[:, :keys], torch.arange(len(kv_TX))[None]
    heads_1TGP = key_TK.view(1, -1, config.kv_heads, config.head_dim)
    rotated_TK = rotate_naive(heads_1TGP, config.rope, position_1T).flatten(2)[0]
    shared_RK = turn_KK[: made.rope_dim]
    late_TR = rotate_naive((key_TK @ shared_RK.T)[None, :, None], made.rope, position_1T)[0, :, 0]
    assert relative_error(rotated_TK @ shared_RK.T, late_TR) < 1e-6


@given(config=shapes)
@settings(max_examples=25)
def test_what_stays_rotated_is_at_least_what_any_one_head_had(config: GQA) -> None:
    kv_TX, moments_XX = random_moments(config)
    made, keys = made_of(config, rope_dim=config.rotated_dim), config.kv_heads * config.head_dim
    turn_KK = turned(moments_XX[:keys, :keys], config, made)
    kept_TR = kv_TX[:, :keys] @ turn_KK[: made.rope_dim].T
    own_TGP = kv_TX[:, :keys].view(-1, config.kv_heads, config.head_dim)
    for first, second, mine, other in zip(
        *pairs(made.rope_dim, interleaved=made.rope.interleaved),
        *pairs(config.rotated_dim, interleaved=config.rope.interleaved),
        strict=True,
    ):
        best = (own_TGP[:, :, mine].square() + own_TGP[:, :, other].square()).sum(0).max()
        assert float(kept_TR[:, [first, second]].square().sum()) >= float(best) * (1 - 1e-9)


def naive_logits(q: Tensor, kv: Tensor, config: GQA, made: MLA, basis: Basis, head: int) -> Tensor:
    """Scores [T, T] of one head by the definition: what is shared rotates, the rest is of low rank."""
    keys, group = config.kv_heads * config.head_dim, head // (config.heads // config.kv_heads)
    turn, position = basis.turn_KK.double(), torch.arange(len(kv))[None]
    wide_TK = torch.zeros(len(kv), keys, dtype=torch.float64)
    wide_TK[:, group * config.head_dim : (group + 1) * config.head_dim] = q
    mixed_q, mixed_k = wide_TK @ turn.T, kv[:, :keys] @ turn.T
    rotated = [
        rotate_naive(x[None, :, None, : made.rope_dim], made.rope, position)[0, :, 0]
        for x in (mixed_q, mixed_k)
    ]
    both = torch.cat((mixed_k[:, made.rope_dim :], kv[:, keys:]), 1)
    low = (both @ basis.down_ZX.double().T) @ basis.up_XZ.double().T
    plain_k = low[:, : keys - made.rope_dim]
    logits = rotated[0] @ rotated[1].T + mixed_q[:, made.rope_dim :] @ plain_k.T
    return logits * config.softmax_scale


@pytest.mark.parametrize("rope_dim", [4, 8, 16])
def test_the_matrices_compute_what_the_definition_says(rope_dim: int) -> None:
    config = GQA(heads=6, kv_heads=3, head_dim=8, rope=Rope(theta=30.0))
    made = made_of(config, rope_dim=rope_dim, kv_rank=9)
    kv_TX, moments_XX = random_moments(config)
    basis = basis_of(moments_XX, config, made)
    q_THP = torch.randn(len(kv_TX), 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q_THX = queries(q_THP.flatten(1).T.float(), basis, config, made).T.unflatten(-1, (6, -1)).double()
    keys = config.kv_heads * config.head_dim
    mixed_TK = kv_TX[:, :keys] @ basis.turn_KK.double().T
    both = torch.cat((mixed_TK[:, rope_dim:], kv_TX[:, keys:]), 1)
    up = ups(basis, config, made).double().unflatten(0, (6, -1))
    latent_TZ = both @ basis.down_ZX.double().T
    position = torch.arange(len(kv_TX))[None]
    shared = rotate_naive(mixed_TK[None, :, None, :rope_dim], made.rope, position)[0, :, 0]
    for head in range(6):
        plain_k = latent_TZ @ up[head, : made.nope_dim].T
        turned_q = rotate_naive(q_THX[None, :, head : head + 1, made.nope_dim :], made.rope, position)[
            0, :, 0
        ]
        logits = (q_THX[:, head, : made.nope_dim] @ plain_k.T + turned_q @ shared.T) * made.softmax_scale
        expected = naive_logits(q_THP[:, head], kv_TX, config, made, basis, head)
        assert relative_error(logits, expected) < 1e-5
        value = (latent_TZ @ basis.up_XZ.double().T)[:, keys - rope_dim :].view(-1, 3, 8)[:, head // 2]
        assert relative_error(latent_TZ @ up[head, made.nope_dim :].T, value) < 1e-5


def test_neighbouring_frequencies_count_as_the_first_of_them() -> None:
    config = GQA(heads=2, kv_heads=2, head_dim=16, rope=Rope(theta=100.0))
    made = made_of(config, rope_dim=4)
    position = torch.arange(9)[None]
    whole, folded = (
        rotary_tables(rope, dim, position)[0] for rope, dim in ((config.rope, 16), (made.rope, 4))
    )
    torch.testing.assert_close(folded, whole[..., ::4])


def test_less_is_kept_at_a_loss_that_grows_and_the_cache_shrinks(tmp_path: Path) -> None:
    dense = saved(LLAMA, tmp_path / "dense")
    data = text(tmp_path / "a.txt")
    apart: list[float] = []
    for kv_rank in (24, 16, 8, 3):
        out = tmp_path / f"{kv_rank}"
        made = upcycle(tmp_path / "dense", out, method=Latent(kv_rank=kv_rank, rope_dim=8), data=data)
        assert made.promise is None
        apart.append(made.layers[0].relative)
        config = store.load(out).config
        assert values_per_token(config) * 32 == values_per_token(dense.config) * (kv_rank + 8)
    assert apart == sorted(apart)
    assert apart[0] > 1e-4
    assert apart[-1] > 2 * apart[0]


def test_both_paths_agree_at_a_low_rank_and_a_gradient_reaches_every_weight(tmp_path: Path) -> None:
    saved(with_attention(SOURCES["biases"]), tmp_path / "dense")
    method = Latent(kv_rank=7, rope_dim=4)
    upcycle(tmp_path / "dense", tmp_path / "mla", method=method, data=text(tmp_path / "a.txt"))
    attention = store.load(tmp_path / "mla").layers[0].attention
    x_BSD = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    context = build_context(attention.config, torch.arange(9).expand(2, 9))
    expanded, absorbed = (
        attention(x_BSD, dataclasses.replace(context, latent_path=path)).y_BSD
        for path in ("expanded", "absorbed")
    )
    assert relative_error(absorbed, expanded) < 1e-5
    expanded.square().sum().backward()
    assert all(w.grad is not None and bool(w.grad.any()) for w in attention.parameters())


def test_a_model_with_experts_keeps_them(tmp_path: Path) -> None:
    saved(LLAMA, tmp_path / "dense")
    data = text(tmp_path / "a.txt")
    upcycle(tmp_path / "dense", tmp_path / "moe", method="copy", experts=4, top_k=2, data=data)
    made = upcycle(tmp_path / "moe", tmp_path / "both", method="mla", data=data)
    assert made.kept
    assert all(sum(found.load) for found in made.layers)
    both, sparse = (store.load(tmp_path / name).eval() for name in ("both", "moe"))
    assert relative_error(both(ids(1, 40)).logits, sparse(ids(1, 40)).logits) < 1e-4


def test_the_command_writes_a_folder_of_our_own_that_is_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(LLAMA, tmp_path / "dense")
    words = [str(tmp_path / "dense"), str(tmp_path / "mla"), "--data", str(text(tmp_path / "a.txt"))]
    options = ["--set", "method.rope_dim=8", "method.kv_rank=12"]
    code = main(["upcycle", *words, "--method", "mla", *options[:2], "--set", options[2]])
    said = capsys.readouterr().out
    assert code == 0
    assert "gate" not in said
    assert "no equality" in said
    assert json.loads((tmp_path / "mla" / "config.json").read_text())["model_type"] == "consilium"
    train = ["train", str(tmp_path / "mla"), "--out", str(tmp_path / "run"), *words[2:], "--steps", "2"]
    assert main([*train, "--batch", "2", "--seq", "32"]) == 0


@pytest.mark.parametrize(
    ("config", "method", "said"),
    [
        (QWEN3, {}, "norms its queries and keys"),
        (with_attention(GQA(heads=2, kv_heads=1, head_dim=8, softcap=3.0)), {}, "caps its attention logits"),
        (with_attention(GQA(heads=2, kv_heads=1, head_dim=8, window=9)), {}, "within a window of 9 tokens"),
        (dataclasses.replace(LLAMA, mtp=MTP(depth=1)), {}, "predict further tokens"),
        (LLAMA, {"kv_rank": 25, "rope_dim": 8}, "more than the 24 dimensions"),
        (LLAMA, {"rope_dim": 12}, "such as 8"),
        (LLAMA, {"rope_dim": 6}, "such as 4"),
        (LLAMA, {"rope_dim": 24}, "a multiple up to 16, such as 16"),
        (LLAMA, {"rope_dim": 1}, "such as 2"),
    ],
)
def test_what_a_latent_cannot_hold_is_refused(config: Model, method: dict[str, int], said: str) -> None:
    with pytest.raises(ConsiliumError, match=said) as found:
        with_latent_attention(config, Latent(**method))
    assert str(found.value).count(". ") == 0


def test_latent_attention_is_not_made_twice() -> None:
    once = with_latent_attention(LLAMA, Latent())
    with pytest.raises(ConsiliumError, match="has latent attention already"):
        with_latent_attention(once, Latent())


def test_experts_belong_to_the_other_methods_and_they_need_them(tmp_path: Path) -> None:
    saved(LLAMA, tmp_path / "dense")
    for options, said in (
        ({"method": "mla", "experts": 4}, "experts is 4, but mla makes latent attention"),
        ({"method": "copy", "experts": 4}, "top_k is missing, and copy needs it"),
    ):
        with pytest.raises(ConsiliumError, match=said):
            upcycle(tmp_path / "dense", tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


def test_sizes_add_up_to_those_of_the_source() -> None:
    for config in SOURCES.values():
        assert widest(config) + full_rank(config, widest(config)) == config.cache_width
    assert lively(with_latent_attention(LLAMA, Latent())).config.attention.nope_dim == 0
