"""Exact parameter counts of a configuration, tensor by tensor, without building it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import final

from consilium.config.attention import GQA, MLA, Attention
from consilium.config.balance import AdaptiveLoss, NoBias
from consilium.config.feed_forward import FeedForward
from consilium.config.model import Model
from consilium.config.moe import AlwaysOn, MoE, NoShared, SigmoidGated
from consilium.config.router import LinearGate, MLPGate, NoGate, Router
from consilium.records.plan import Parameters


@final
@dataclass(frozen=True, slots=True)
class Count:
    """Values of a part: all, those that one token uses, and those of matrices that it multiplies with."""

    total: int = 0
    active: int = 0
    matrices: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.total + other.total, self.active + other.active, self.matrices + other.matrices)

    def __mul__(self, times: int) -> Count:
        return Count(self.total * times, self.active * times, self.matrices * times)


def _matrix(rows: int, columns: int) -> Count:
    return Count(*(rows * columns,) * 3)


def _vector(size: int) -> Count:
    return Count(size, size, 0)


def parameters(model: Model) -> Parameters:
    """Count the parameters of ``model``; equals the built model to the last unit."""
    main, extra = decoder(model), mtp(model)
    embedding = 0 if model.tied else model.vocab_size * model.hidden_size
    return Parameters(
        total=main.total,
        active=main.active,
        active_without_input_embedding=main.active - embedding,
        mtp=extra.total,
        buffers=_buffers(model),
    )


def decoder(model: Model) -> Count:
    """Embedding, blocks, norm and head. A tied matrix is stored once and multiplied once, as the head."""
    embedding = model.vocab_size * model.hidden_size
    ends = _matrix(model.vocab_size, model.hidden_size) + _vector(model.hidden_size)
    if not model.tied:
        ends += Count(embedding, embedding, 0)
    return sum((block(model, i) for i in range(model.layers)), ends)


def mtp(model: Model) -> Count:
    """Multi-token prediction: per module two norms, a projection of [embedding; hidden], a block, a norm.

    Embedding and head are the main model's (DeepSeek-V3, 2412.19437 section 2.2).
    """
    width = model.hidden_size
    fixed = _vector(width) * 3 + _matrix(width, 2 * width)
    return sum((fixed + block(model, model.layers + k) for k in range(model.mtp.depth)), Count())


def block(model: Model, layer: int) -> Count:
    """Attention, feed-forward network or experts, and the norms of block ``layer``."""
    width = model.hidden_size
    norms = _vector(width) * (4 if model.norms == "around" else 2)
    if model.moe is not None and model.is_moe(layer):
        return norms + attention(model.attention, width) + moe(model.moe, width)
    assert model.dense is not None
    return norms + attention(model.attention, width) + feed_forward(model.dense, width)


def attention(config: Attention, width: int) -> Count:
    """Projections and norms of one attention layer on hidden states of ``width``."""
    match config:
        case GQA():
            return _grouped_query(config, width)
        case MLA():
            return _latent(config, width)


def _grouped_query(config: GQA, width: int) -> Count:
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    count = _matrix(width, queries) * 2 + _matrix(width, keys) * 2
    if config.qkv_bias:
        count += _vector(queries + 2 * keys)
    match config.qk_norm:
        case "none":
            return count
        case "head":
            return count + _vector(2 * config.head_dim)
        case "full":
            return count + _vector(queries + keys)


def _latent(config: MLA, width: int) -> Count:
    key = config.nope_dim + config.rope_dim
    if config.q_rank is None:
        queries = _matrix(width, config.heads * key)
    else:
        down = _matrix(width, config.q_rank) + _vector(config.q_rank)
        queries = down + _matrix(config.q_rank, config.heads * key)
    latent = _matrix(width, config.kv_rank + config.rope_dim) + _vector(config.kv_rank)
    expanded = _matrix(config.kv_rank, config.heads * (config.nope_dim + config.v_dim))
    return queries + latent + expanded + _matrix(config.heads * config.v_dim, width)


def feed_forward(config: FeedForward, width: int) -> Count:
    return _matrix(config.matrices * width, config.width)


def moe(config: MoE, width: int) -> Count:
    """Router, routed experts of which ``active_experts`` count as active, and what every token uses.

    The last are the shared experts and, where routed experts work in a latent space, its two projections.
    """
    expert = config.matrices * config.expert_size(width) * config.width
    active = round(config.active_experts * expert)
    routed = Count(config.experts * expert, active, active)
    latent = _matrix(width, 2 * (config.latent or 0))
    return _router(config.router, config.experts, width) + routed + latent + _shared(config, width)


def _router(config: Router, experts: int, width: int) -> Count:
    gates = _matrix(config.gate_rows(experts), width)
    match config.projection:
        case LinearGate(bias=bias):
            return gates + (_vector(experts) if bias else Count())
        case MLPGate():
            return gates + _matrix(experts, experts)
        case NoGate():
            return gates


def _shared(config: MoE, width: int) -> Count:
    network = _matrix(config.matrices * width, config.shared_width)
    match config.shared:
        case NoShared():
            return Count()
        case AlwaysOn():
            return network
        case SigmoidGated():
            return network + _matrix(1, width)


def _buffers(model: Model) -> int:
    """Saved control state of the decoder without MTP: a bias an expert, a coefficient an adaptive loss."""
    if model.moe is None:
        return 0
    balance = model.moe.balance
    biased = not isinstance(balance.bias, NoBias) or model.moe.router.offset != "none"
    layer = model.moe.experts * biased + any(isinstance(loss, AdaptiveLoss) for loss in balance.losses)
    return layer * len(dataclasses.replace(model, mtp=dataclasses.replace(model.mtp, depth=0)).moe_layers)
