"""What the native kernels are told of a block: where its weights are, and what to do with them.

Prepared for weights that stay where they are; what is written into them counts.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from consilium.attention.gqa import GroupedQueryAttention
from consilium.attention.mla import LatentAttention
from consilium.model.block import DecoderBlock
from consilium.moe.layer import MoELayer
from consilium.moe.shared import GatedNetwork, Nobody
from consilium.ops.feed_forward import DenseNetwork
from consilium.ops.linear import Linear
from consilium.ops.native.library import (
    ACTIVATIONS,
    Attend,
    Feed,
    Layer,
    NativeMatrix,
    NativeNorm,
    Route,
    native_norm,
)
from consilium.ops.norm import RMSNorm
from consilium.ops.weights import Matrix

_Part = TypeVar("_Part")


class Unknown(Exception):
    """The kernels do not read this part."""


def layer_of(block: DecoderBlock) -> Layer:
    layer = Layer(attend=_attend(block), latent=isinstance(block.attention, LatentAttention))
    layer.feed.post_norm = _norm(block.feed_forward_post_norm)
    if block.moe is None:
        assert block.feed_forward is not None, "a block is dense or routes"
        _share(layer.feed, block.feed_forward)
        return layer
    _experts(layer.feed, block.moe)
    route = block.moe.fused()
    layer.routed = route is not None
    layer.route = route or Route()
    layer.feed.choices = layer.route.choices
    return layer


def _attend(block: DecoderBlock) -> Attend:
    call = Attend(
        norm=_norm(block.attention_norm),
        post_norm=_norm(block.attention_post_norm),
        next_norm=_norm(block.feed_forward_norm),
    )
    match block.attention:
        case GroupedQueryAttention():
            return _grouped(call, block.attention)
        case LatentAttention():
            return _latent(call, block.attention)
        case _:
            raise Unknown


def _grouped(call: Attend, attention: GroupedQueryAttention) -> Attend:
    config = attention.config
    call.heads, call.kv_heads, call.key, call.pairs = (
        config.heads,
        config.kv_heads,
        config.head_dim,
        config.rotated_dim // 2,
    )
    call.interleaved, call.norm_each = config.rope.interleaved, config.qk_norm != "full"
    call.scale, call.softcap = config.softmax_scale, config.softcap or 0.0
    call.window = config.window or 0
    call.query, call.keys, call.values = (linear_of(part) for part in (attention.q, attention.k, attention.v))
    call.output = linear_of(attention.o)
    call.query_norm, call.key_norm = _norm(attention.q_norm), _norm(attention.k_norm)
    return call


def _latent(call: Attend, attention: LatentAttention) -> Attend:
    config = attention.config
    call.heads, call.nope, call.pairs = config.heads, config.nope_dim, config.rope_dim // 2
    call.value, call.rank = config.v_dim, config.kv_rank
    call.interleaved, call.scale = config.rope.interleaved, config.softmax_scale
    if config.q_rank is None:
        call.query = linear_of(attention.q)
    else:
        call.query, call.query_up = linear_of(attention.q_down), linear_of(attention.q_up)
        call.query_norm = _norm(attention.q_norm)
    call.keys, call.output = linear_of(attention.kv_down), linear_of(attention.o)
    call.latent_up = matrix_of(attention.kv_up.matrix)
    call.key_norm = _norm(attention.kv_norm)
    return call


def _experts(feed: Feed, moe: MoELayer) -> None:
    if not moe.whole:
        raise Unknown
    feed.experts, _, feed.width = moe.experts.down_stack.shape
    feed.up, feed.down = (_known(s.native()) for s in (moe.experts.up_stack, moe.experts.down_stack))
    feed.activation = ACTIVATIONS[moe.experts.activation]
    match moe.shared:
        case DenseNetwork():
            _share(feed, moe.shared)
        case GatedNetwork():
            feed.shared_gate = linear_of(moe.shared.gate)
            _share(feed, moe.shared)
        case Nobody():
            pass
        case _:
            raise Unknown


def _share(feed: Feed, network: DenseNetwork | GatedNetwork) -> None:
    """A network that all tokens visit."""
    feed.shared_up, feed.shared_down = linear_of(network.up), linear_of(network.down)
    feed.shared_width = feed.shared_down.columns
    feed.activation = ACTIVATIONS[network.activation]


def linear_of(linear: Linear) -> NativeMatrix:
    return matrix_of(linear.matrix, linear.bias)


def matrix_of(matrix: Matrix, bias_O: Tensor | None = None) -> NativeMatrix:
    return _known(matrix.native(bias_O))


def _norm(module: nn.Module) -> NativeNorm:
    if isinstance(module, RMSNorm):
        return _known(native_norm(module.weight, module.epsilon))
    return _known(native_norm(None))


def _known(part: _Part | None) -> _Part:
    if part is None:
        raise Unknown
    return part
