"""Every trained tensor of a model by state name and shape, as data.

Legend: D hidden size, V vocabulary, E experts, F width, G = 2F where the activation is gated (gate above up)
else F, L latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from consilium.config.attention import GQA, MLA
from consilium.config.feed_forward import GATED, Activation
from consilium.config.model import Model
from consilium.config.moe import MoE, NoShared, SigmoidGated
from consilium.config.router import (
    Jitter,
    LearnedNoise,
    LinearGate,
    MLPGate,
    NoGate,
    NoNoise,
    Router,
    TwoLevel,
)

Shape = tuple[int, ...]
Shapes = Iterator[tuple[str, Shape]]


@final
@dataclass(frozen=True, slots=True)
class Part:
    """Tensors that some part of a model has, such as all of its blocks with experts."""

    name: str
    """``model``, ``layers 3-60`` or ``mtp 0``."""
    tensors: tuple[tuple[str, Shape], ...]


def parts(model: Model) -> tuple[Part, ...]:
    """The model as a reader sees it: what stands once, each kind of block once, prediction modules."""
    dense = [layer for layer in range(model.layers) if not model.is_moe(layer)]
    sparse = [layer for layer in range(model.layers) if model.is_moe(layer)]
    kinds = [Part(_named(layers), tuple(block(model, layers[0]))) for layers in (dense, sparse) if layers]
    modules = [Part(f"mtp {i}", tuple(prediction(model, i))) for i in range(model.mtp.depth)]
    return Part("model", tuple(ends(model))), *kinds, *modules


def _named(layers: Sequence[int]) -> str:
    """``layers 0-2``, or ``layers 1, 3, ..., 23`` where they have gaps."""
    first, last = layers[0], layers[-1]
    if first == last:
        return f"layer {first}"
    if last - first == len(layers) - 1:
        return f"layers {first}-{last}"
    return f"layers {first}, {layers[1]}, ..., {last}" if len(layers) > 2 else f"layers {first}, {last}"


def shapes(model: Model) -> Shapes:
    """Names and shapes of all parameters, those of multi-token prediction last."""
    yield from ends(model)
    for layer in range(model.layers):
        yield from _within(f"layers.{layer}", block(model, layer))
    for module in range(model.mtp.depth):
        yield from _within(f"mtp.{module}", prediction(model, module))


def ends(model: Model) -> Shapes:
    """Embedding [V, D], last norm and, unless tied, head."""
    matrix = model.vocab_size, model.hidden_size
    yield "embed.weight", matrix
    yield "norm.weight", (model.hidden_size,)
    if not model.tied:
        yield "head.weight", matrix


def prediction(model: Model, module: int) -> Shapes:
    """A multi-token prediction module (DeepSeek-V3, 2412.19437 section 2.2), its block included."""
    width = model.hidden_size
    yield "embed_norm.weight", (width,)
    yield "hidden_norm.weight", (width,)
    yield "project.weight", (width, 2 * width)
    yield from _within("block", block(model, model.layers + module))
    yield "norm.weight", (width,)


def block(model: Model, layer: int) -> Shapes:
    """The tensors of block ``layer``, named from the block on."""
    width = model.hidden_size
    match model.norms:
        case "before":
            norms = "attention_norm", "feed_forward_norm"
        case "around":
            norms = "attention_norm", "attention_post_norm", "feed_forward_norm", "feed_forward_post_norm"
    yield from ((f"{name}.weight", (width,)) for name in norms)
    yield from _within("attention", _attention(model.attention, width))
    if model.moe is not None and model.is_moe(layer):
        yield from _within("moe", _moe(model.moe, width))
    else:
        assert model.dense is not None
        yield from _within("feed_forward", _network(model.dense.activation, width, model.dense.width))


def _within(name: str, tensors: Shapes) -> Shapes:
    return ((f"{name}.{key}", shape) for key, shape in tensors)


def _attention(config: GQA | MLA, width: int) -> Shapes:
    match config:
        case GQA():
            return _grouped_query(config, width)
        case MLA():
            return _latent_attention(config, width)


def _grouped_query(config: GQA, width: int) -> Shapes:
    rows = {"q": config.heads * config.head_dim} | dict.fromkeys("kv", config.kv_heads * config.head_dim)
    for part, size in rows.items():
        yield from _biased(part, size, width, bias=config.qkv_bias)
    yield "o.weight", (width, rows["q"])
    match config.qk_norm:
        case "none":
            return
        case "head":
            yield from ((f"{part}_norm.weight", (config.head_dim,)) for part in "qk")
        case "full":
            yield from ((f"{part}_norm.weight", (rows[part],)) for part in "qk")


def _latent_attention(config: MLA, width: int) -> Shapes:
    query = config.heads * (config.nope_dim + config.rope_dim)
    if config.q_rank is None:
        yield from _biased("q", query, width, bias=config.qkv_bias)
    else:
        yield from _biased("q_down", config.q_rank, width, bias=config.qkv_bias)
        yield "q_norm.weight", (config.q_rank,)
        yield "q_up.weight", (query, config.q_rank)
    yield from _biased("kv_down", config.kv_rank + config.rope_dim, width, bias=config.qkv_bias)
    if config.kv_norm == "rms":
        yield "kv_norm.weight", (config.kv_rank,)
    yield "kv_up.weight", (config.heads * (config.nope_dim + config.v_dim), config.kv_rank)
    yield "o.weight", (width, config.heads * config.v_dim)


def _biased(part: str, rows: int, width: int, *, bias: bool) -> Shapes:
    yield f"{part}.weight", (rows, width)
    if bias:
        yield f"{part}.bias", (rows,)


def _moe(config: MoE, width: int) -> Shapes:
    yield from _within("router", _router(config.router, config.experts, width))
    inner = config.latent or width
    if config.latent is not None:
        yield "latent.down.weight", (inner, width)
        yield "latent.up.weight", (width, inner)
    yield "experts.up", (config.experts, _rows(config.activation, config.width), inner)
    yield "experts.down", (config.experts, inner, config.width)
    if not isinstance(config.shared, NoShared):
        yield from _within("shared", _network(config.activation, width, config.shared_width))
    if isinstance(config.shared, SigmoidGated):
        yield "shared.gate.weight", (1, width)


def _router(config: Router, experts: int, width: int) -> Shapes:
    match config.projection:
        case LinearGate(bias=bias):
            yield "projection.weight", (experts, width)
            if bias:
                yield "projection.bias", (experts,)
        case MLPGate():
            yield "projection.hidden.weight", (experts, width)
            yield "projection.output.weight", (experts, experts)
        case NoGate():
            pass
    levels = {"": experts}
    if isinstance(config.select, TwoLevel):
        yield "primary.weight", (config.select.groups, width)
        levels["primary_"] = config.select.groups
    match config.noise:
        case NoNoise() | Jitter():
            return
        case LearnedNoise():
            yield from ((f"{level}noise.weight", (rows, width)) for level, rows in levels.items())


def _network(activation: Activation, width: int, inner: int) -> Shapes:
    yield "up.weight", (_rows(activation, inner), width)
    yield "down.weight", (width, inner)


def _rows(activation: Activation, width: int) -> int:
    """Rows of an up projection: gate above up where there is a gate."""
    return 2 * width if activation in GATED else width
