"""Small models of every layout, and ways to break a saved folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from hypothesis import strategies as st

from consilium.checkpoint import store
from consilium.config.attention import GQA, MLA, Rope, Yarn
from consilium.config.balance import Balance, SequenceLoss, SignBias
from consilium.config.feed_forward import FeedForward
from consilium.config.model import MTP, Model
from consilium.config.moe import AlwaysOn, Capacity, MoE
from consilium.config.router import (
    Groups,
    Hash,
    LearnedNoise,
    MLPGate,
    Normalised,
    Raw,
    Router,
    Sigmoid,
    SoftmaxOfSelected,
    TopK,
)
from consilium.model.build import build
from consilium.model.decoder import Decoder

YARN = Yarn(factor=4.0, original_length=64, mscale=0.707, mscale_all_dim=0.707)
LATENT = MLA(heads=2, q_rank=12, kv_rank=8, nope_dim=6, rope_dim=4, v_dim=6)
GROUPED = GQA(heads=4, kv_heads=2, head_dim=8)
DENSE = FeedForward(width=24)


def llama() -> Model:
    return Model(family="llama", vocab_size=40, hidden_size=16, layers=2, attention=GROUPED, dense=DENSE)


def mixtral() -> Model:
    moe = MoE(experts=4, width=12, router=Router(select=TopK(k=2)))
    return Model(family="mixtral", vocab_size=40, hidden_size=16, layers=2, attention=GROUPED, moe=moe)


def deepseek_v2(*, q_rank: int | None = 12, groups: Groups | None = None) -> Model:
    attention = MLA(
        heads=2,
        q_rank=q_rank,
        kv_rank=8,
        nope_dim=6,
        rope_dim=4,
        v_dim=6,
        rope=Rope(interleaved=True, scaling=YARN),
    )
    router = Router(select=TopK(k=2, groups=groups), weight=Raw(), scale=16.0)
    moe = MoE(experts=6, width=10, router=router, shared=AlwaysOn(count=2, width=10))
    return Model(
        family="deepseek-v2",
        vocab_size=40,
        hidden_size=16,
        layers=3,
        attention=attention,
        dense=DENSE,
        dense_first=1,
        moe=moe,
    )


def deepseek_v3(*, depth: int = 0, groups: Groups | None = None) -> Model:
    router = Router(score=Sigmoid(), offset="scores", select=TopK(k=2, groups=groups), scale=2.5)
    balance = Balance(losses=(SequenceLoss(coefficient=1e-4),), bias=SignBias())
    moe = MoE(experts=8, width=10, router=router, balance=balance, shared=AlwaysOn(count=1, width=10))
    return Model(
        family="deepseek-v3",
        vocab_size=40,
        hidden_size=16,
        layers=3,
        attention=LATENT,
        dense=DENSE,
        dense_first=1,
        moe=moe,
        mtp=MTP(depth=depth),
    )


def switch() -> Model:
    router = Router(select=TopK(k=1), weight=Raw())
    moe = MoE(experts=4, width=12, activation="geglu", router=router, admission=Capacity(factor=1.25))
    return Model(
        family="switch",
        vocab_size=40,
        hidden_size=16,
        layers=2,
        attention=GROUPED,
        dense=DENSE,
        moe=moe,
        moe_every=2,
        tied=True,
    )


def hashed() -> Model:
    moe = MoE(experts=4, width=12, router=Router(select=Hash(k=1, vocab_size=40), weight=Raw()))
    return Model(family="hash", vocab_size=40, hidden_size=16, layers=2, attention=GROUPED, moe=moe)


def noisy() -> Model:
    attention = GQA(heads=4, kv_heads=4, head_dim=4, qkv_bias=True, qk_norm="head")
    router = Router(projection=MLPGate(), noise=LearnedNoise(), select=TopK(k=2), weight=SoftmaxOfSelected())
    moe = MoE(experts=4, width=12, router=router)
    return Model(family="shazeer", vocab_size=40, hidden_size=16, layers=2, attention=attention, moe=moe)


def windowed(config: Model, window: int = 3, *full_layers: int) -> Model:
    assert isinstance(config.attention, GQA)
    attention = dataclasses.replace(config.attention, window=window, full_layers=full_layers)
    return dataclasses.replace(config, attention=attention)


HUGGING_FACE = {
    "llama": llama(),
    "mistral": windowed(llama()),
    "mixtral": mixtral(),
    "mixtral-windowed": windowed(mixtral()),
    "deepseek_v2": deepseek_v2(groups=Groups(count=3, keep=2, score="max")),
    "deepseek_v2-lite": deepseek_v2(q_rank=None),
    "deepseek_v3": deepseek_v3(groups=Groups(count=4, keep=2, score="top2_sum")),
    "deepseek_v3-mtp": deepseek_v3(depth=2),
}
ALL = {**HUGGING_FACE, "switch": switch(), "hash": hashed(), "noisy": noisy()}


@st.composite
def representable(draw: st.DrawFn) -> Model:
    """Any small model of the four layouts that transformers has."""
    kind = draw(st.sampled_from(["llama", "mixtral", "deepseek_v2", "deepseek_v3"]))
    layers, heads = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    shared = {
        "family": kind.replace("_", "-"),
        "vocab_size": draw(st.integers(1, 50)),
        "hidden_size": heads * draw(st.integers(1, 6)),
        "layers": layers,
        "tied": draw(st.booleans()),
    }
    dense = FeedForward(width=draw(st.integers(1, 20)))
    if kind in {"llama", "mixtral"}:
        attention = GQA(heads=heads, kv_heads=1, head_dim=2 * draw(st.integers(1, 4)))
        moe = draw(_experts(Router(select=TopK(k=2))))
        return Model(attention=attention, **shared, **({"dense": dense} if kind == "llama" else {"moe": moe}))
    attention = MLA(
        heads=heads,
        q_rank=draw(st.none() | st.integers(1, 9)),
        kv_rank=draw(st.integers(1, 9)),
        nope_dim=draw(st.integers(1, 5)),
        rope_dim=2 * draw(st.integers(1, 3)),
        v_dim=draw(st.integers(1, 5)),
    )
    v3 = Router(
        score=Sigmoid(),
        offset="scores",
        select=TopK(k=2),
        weight=draw(st.sampled_from([Raw(), Normalised()])),
    )
    router = v3 if kind == "deepseek_v3" else Router(select=TopK(k=1), weight=Raw())
    depth = draw(st.integers(0, 2)) if kind == "deepseek_v3" else 0
    first = draw(st.integers(0, layers - 1))
    moe = draw(_experts(router, shared=draw(st.integers(1, 3))))
    return Model(attention=attention, dense=dense, dense_first=first, moe=moe, mtp=MTP(depth=depth), **shared)


@st.composite
def _experts(draw: st.DrawFn, router: Router, shared: int = 0) -> MoE:
    width = draw(st.integers(1, 9))
    return MoE(
        experts=draw(st.integers(2, 5)),
        width=width,
        router=router,
        **({"shared": AlwaysOn(count=shared, width=width)} if shared else {}),
    )


@torch.no_grad()
def trained(config: Model, seed: int = 0, dtype: str = "float32") -> Decoder:
    """A model with distinct values everywhere, norms and balance state included."""
    model = build(config, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


def saved(folder: Path, config: Model, seed: int = 0, *, manifest: bool = True) -> Path:
    """A folder with a model in it; without ``manifest`` it is as one from elsewhere."""
    store.save(trained(config, seed), folder)
    if not manifest:
        (folder / "manifest.json").unlink()
    return folder


@torch.no_grad()
def answer(model: Decoder) -> torch.Tensor:
    """Logits for a few tokens."""
    return model.eval()(torch.arange(12).reshape(2, 6)).logits
