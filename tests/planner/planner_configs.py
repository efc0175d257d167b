"""Random models for tests of the planner, and every trained tensor of a model by name and shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from hypothesis import strategies as st

from consilium.config.attention import GQA, MLA, Attention, Rope
from consilium.config.feed_forward import GATED, Activation, FeedForward
from consilium.config.model import MTP, Model
from consilium.config.moe import AlwaysOn, MoE, NoShared, SigmoidGated
from consilium.config.router import (
    Hash,
    LearnedNoise,
    LinearGate,
    MLPGate,
    NoGate,
    NoNoise,
    Raw,
    Router,
    SoftmaxOfSelected,
    TopK,
    TwoLevel,
    Uniform,
)

activations: st.SearchStrategy[Activation] = st.sampled_from(get_args(Activation))
small = st.integers(1, 5)


@st.composite
def grouped_query(draw: st.DrawFn) -> GQA:
    kv_heads = draw(small)
    return GQA(
        heads=kv_heads * draw(small),
        kv_heads=kv_heads,
        head_dim=2 * draw(small),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.sampled_from(["none", "head", "full"])),
    )


partly_rotated = st.builds(
    GQA, heads=st.just(2), kv_heads=st.just(1), head_dim=st.just(8), rope=st.just(Rope(fraction=0.5))
)


latent = st.builds(
    MLA,
    heads=small,
    q_rank=st.none() | small,
    kv_rank=small,
    nope_dim=st.just(0) | small,
    rope_dim=small.map(lambda half: 2 * half),
    v_dim=small,
    kv_norm=st.sampled_from(["rms", "none"]),
    qkv_bias=st.booleans(),
)


@st.composite
def experts(draw: st.DrawFn) -> MoE:
    count = draw(small)
    selects = TopK(k=draw(st.integers(1, count))), Hash(k=draw(st.integers(1, count)), vocab_size=9)
    return MoE(
        experts=count,
        width=draw(small),
        latent=draw(st.none() | small),
        activation=draw(activations),
        router=Router(
            projection=draw(st.sampled_from([LinearGate(), LinearGate(bias=True), MLPGate()])),
            noise=draw(st.sampled_from([NoNoise(), LearnedNoise()])),
            select=draw(st.sampled_from(selects)),
            weight=Raw(),
        ),
        shared=draw(st.sampled_from([NoShared(), AlwaysOn(count=3, width=2), SigmoidGated(width=5)])),
    )


@st.composite
def hierarchical(draw: st.DrawFn) -> MoE:
    groups, size = draw(small), 1 + draw(small)
    keep = draw(st.integers(1, groups))
    select = TwoLevel(groups=groups, keep=keep, k=draw(st.integers(1 if keep > 1 else 2, size)))
    noise = draw(st.sampled_from([NoNoise(), LearnedNoise()]))
    router = Router(noise=noise, select=select, weight=SoftmaxOfSelected())
    return MoE(experts=groups * size, width=draw(small), router=router, latent=draw(st.none() | small))


@st.composite
def gateless(draw: st.DrawFn) -> MoE:
    router = Router(projection=NoGate(), select=Hash(vocab_size=9), weight=Uniform())
    return MoE(experts=draw(small), width=draw(small), router=router)


models: st.SearchStrategy[Model] = st.builds(
    Model,
    family=st.just("llama"),
    vocab_size=st.integers(1, 9),
    hidden_size=small,
    layers=small,
    attention=grouped_query() | partly_rotated | latent,
    dense=st.builds(FeedForward, width=small, activation=activations),
    moe=st.none() | experts() | hierarchical() | gateless(),
    dense_first=st.integers(0, 3),
    moe_every=st.integers(1, 3),
    norms=st.sampled_from(["before", "around"]),
    tied=st.booleans(),
    mtp=st.builds(MTP, depth=st.integers(0, 2)),
)

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def tensors(model: Model) -> Shapes:
    """Every trained tensor of ``model`` as (state name, shape)."""
    width = model.hidden_size
    yield "embed.weight", (model.vocab_size, width)
    yield "norm.weight", (width,)
    if not model.tied:
        yield "head.weight", (model.vocab_size, width)
    for i in range(model.layers):
        yield from _block(model, i, f"layers.{i}")
    for k in range(model.mtp.depth):
        yield f"mtp.{k}.embed_norm.weight", (width,)
        yield f"mtp.{k}.hidden_norm.weight", (width,)
        yield f"mtp.{k}.project.weight", (width, 2 * width)
        yield from _block(model, model.layers + k, f"mtp.{k}.block")
        yield f"mtp.{k}.norm.weight", (width,)


def active(model: Model, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The part of a tensor that one token uses: all of it, but k of the stacked experts."""
    if ".experts." not in name:
        return shape
    assert model.moe is not None
    return (model.moe.most_active, *shape[1:])


def _block(model: Model, layer: int, name: str) -> Shapes:
    width = model.hidden_size
    yield f"{name}.attention_norm.weight", (width,)
    yield f"{name}.feed_forward_norm.weight", (width,)
    if model.norms == "around":
        yield f"{name}.attention_post_norm.weight", (width,)
        yield f"{name}.feed_forward_post_norm.weight", (width,)
    yield from _attention(model.attention, width, f"{name}.attention")
    if model.is_moe(layer):
        assert model.moe is not None
        yield from _moe(model.moe, width, f"{name}.moe")
    else:
        assert model.dense is not None
        yield from _network(f"{name}.feed_forward", model.dense.activation, width, model.dense.width)


def _attention(config: Attention, width: int, name: str) -> Shapes:
    if isinstance(config, GQA):
        sizes = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
        for part, heads in sizes.items():
            yield f"{name}.{part}.weight", (heads * config.head_dim, width)
            if config.qkv_bias:
                yield f"{name}.{part}.bias", (heads * config.head_dim,)
        for part in ("q", "k") if config.qk_norm != "none" else ():
            heads = sizes[part] if config.qk_norm == "full" else 1
            yield f"{name}.{part}_norm.weight", (heads * config.head_dim,)
        yield f"{name}.o.weight", (width, config.heads * config.head_dim)
        return
    query = config.heads * (config.nope_dim + config.rope_dim)
    for part, rows in {"q" if config.q_rank is None else "q_down": config.q_rank or query}.items():
        if config.qkv_bias:
            yield f"{name}.{part}.bias", (rows,)
            yield f"{name}.kv_down.bias", (config.kv_rank + config.rope_dim,)
    if config.q_rank is None:
        yield f"{name}.q.weight", (query, width)
    else:
        yield f"{name}.q_down.weight", (config.q_rank, width)
        yield f"{name}.q_norm.weight", (config.q_rank,)
        yield f"{name}.q_up.weight", (query, config.q_rank)
    yield f"{name}.kv_down.weight", (config.kv_rank + config.rope_dim, width)
    if config.kv_norm == "rms":
        yield f"{name}.kv_norm.weight", (config.kv_rank,)
    yield f"{name}.kv_up.weight", (config.heads * (config.nope_dim + config.v_dim), config.kv_rank)
    yield f"{name}.o.weight", (width, config.heads * config.v_dim)


def _network(name: str, activation: Activation, width: int, inner: int) -> Shapes:
    yield f"{name}.up.weight", (inner * (2 if activation in GATED else 1), width)
    yield f"{name}.down.weight", (width, inner)


def _moe(config: MoE, width: int, name: str) -> Shapes:
    yield from _router(config, width, f"{name}.router")
    gates = 2 if config.activation in GATED else 1
    inner = config.latent or width
    yield f"{name}.experts.up", (config.experts, gates * config.width, inner)
    yield f"{name}.experts.down", (config.experts, inner, config.width)
    if config.latent is not None:
        yield f"{name}.latent.down.weight", (config.latent, width)
        yield f"{name}.latent.up.weight", (width, config.latent)
    match config.shared:
        case NoShared():
            pass
        case AlwaysOn(count=count, width=each):
            yield from _network(f"{name}.shared", config.activation, width, count * each)
        case SigmoidGated(width=each):
            yield from _network(f"{name}.shared", config.activation, width, each)
            yield f"{name}.shared.gate.weight", (1, width)


def _router(config: MoE, width: int, name: str) -> Shapes:
    router = config.router
    if isinstance(router.noise, LearnedNoise):
        yield f"{name}.noise.weight", (config.experts, width)
    if isinstance(router.select, TwoLevel):
        yield f"{name}.primary.weight", (router.select.groups, width)
        if isinstance(router.noise, LearnedNoise):
            yield f"{name}.primary_noise.weight", (router.select.groups, width)
    match router.projection:
        case LinearGate(bias=bias):
            yield f"{name}.projection.weight", (config.experts, width)
            if bias:
                yield f"{name}.projection.bias", (config.experts,)
        case MLPGate():
            yield f"{name}.projection.hidden.weight", (config.experts, width)
            yield f"{name}.projection.output.weight", (config.experts, config.experts)
        case NoGate():
            pass
