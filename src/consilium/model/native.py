"""Passes over a cache by the native kernels: one call for all layers whose router they know.

Legend: B sequences, D hidden size, K choices a token, E experts, M MoE layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar, final

import torch
from torch import Tensor, nn

from consilium.attention.context import build_context
from consilium.attention.gqa import GroupedQueryAttention
from consilium.attention.mla import LatentAttention
from consilium.attention.types import Context
from consilium.kv.types import Cache, View
from consilium.model.block import DecoderBlock
from consilium.model.decoder import Decoder
from consilium.model.types import Inputs, Options, Output
from consilium.moe.layer import MoELayer
from consilium.moe.shared import GatedNetwork, Nobody
from consilium.moe.types import Chosen, Report, Tokens
from consilium.ops.feed_forward import DenseNetwork
from consilium.ops.linear import Linear
from consilium.ops.native.library import (
    ACTIVATIONS,
    CACHES,
    TYPES,
    Attend,
    Feed,
    Kernels,
    Layer,
    NativeMatrix,
    NativeNorm,
    Pass,
    Route,
    kernels,
    native_norm,
)
from consilium.ops.norm import RMSNorm
from consilium.ops.weights import Matrix

_Part = TypeVar("_Part")


class _Unknown(Exception):
    """The kernels do not read this part."""


@final
@dataclass(frozen=True, slots=True)
class NativeDecoder:
    """The values of ``Decoder.forward`` with a cache, within rounding.

    They are of one new token of each sequence, or of a part of a prompt. States are float32 from the first
    layer to the last, whatever the dtype of the weights, and every value is summed in one order: what other
    sequences are in the batch changes no bit. Prepared for weights that stay where they are; what is written
    into them counts.
    """

    model: Decoder
    kernels: Kernels
    layers: tuple[Layer, ...]
    """Without the cache and what a pass writes."""
    head: NativeMatrix
    choices: int
    """K, the most of any layer whose router the kernels know."""
    experts: int
    """E; 0 in a model without."""

    @staticmethod
    def of(model: Decoder) -> NativeDecoder | None:
        """Prepare ``model``; None where there are no kernels, or it has a part that they do not read."""
        found = kernels()
        if found is None:
            return None
        try:
            layers = tuple(_layer(block) for block in model.layers if isinstance(block, DecoderBlock))
            head = _matrix((model.embed if model.config.tied else model.head).matrix)
        except _Unknown:
            return None
        choices = max(layer.route.choices for layer in layers)
        return NativeDecoder(model, found, layers, head, choices, max(layer.feed.experts for layer in layers))

    @property
    def reads_prompts(self) -> bool:
        """Whether ``read`` is for this model, and the faster way: MKL is best at products of float32.

        Where all tokens decide together who goes where, parts are another answer than the whole.
        """
        moe = self.model.config.moe
        narrow = self.layers[0].attend.output.type != TYPES[torch.float32]
        return narrow and (moe is None or moe.causal)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the blocks with experts."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.feed.experts)

    @torch.inference_mode()
    def step(self, inputs: Inputs, cache: Cache, options: Options) -> Output:
        """Logits and reports after one token [B, 1] of each sequence, whose row goes to the cache.

        ``options`` ask for nothing that training or an observer needs.
        """
        found = self.states(inputs, cache, options, many=False)
        return Output(self.logits(found.x_TD)[:, None], found.reports, {})

    @torch.inference_mode()
    def read(self, inputs: Inputs, cache: Cache, options: Options) -> Output:
        """Logits [1, 1, V] and reports after a part of a prompt, [1, S] tokens behind those that are cached.

        A token's values depend on what came before it and on the tokens of its part, on nothing else.
        """
        found = self.states(inputs, cache, options, many=True)
        return Output(self.logits(found.x_TD[-1:])[:, None], found.reports, {})

    @torch.inference_mode()
    def states(self, inputs: Inputs, cache: Cache, options: Options, *, many: bool) -> States:
        """After all layers: of a token of each sequence, or ``many``, the tokens of a part of a prompt."""
        context = build_context(self.model.config.attention, inputs.positions().contiguous(), cached=True)
        x_BD = self.model.embedded(inputs.ids_BS, options).flatten(0, 1).float()
        buffers = _Buffers.of(x_BD, self.choices, len(self.moe_layers), self.experts)
        shared = _shared(buffers, context, many=many)
        layers = (Layer * len(self.layers))(*self.layers)
        views = [cache.layer(index).view(context.keys) for index in range(len(layers))]
        for layer, view in zip(layers, views, strict=True):
            _fill(layer.attend, view)
            layer.routed = layer.routed and options.mode.override is None
        reports = self._run(shared, layers, buffers, inputs.tokens(), options)
        choices = {index: layers[index].feed.choices for index in self.moe_layers}
        return States(buffers.x_BD, reports, choices, buffers)

    def _run(
        self, shared: Pass, layers: ctypes.Array[Layer], buffers: _Buffers, tokens: Tokens, options: Options
    ) -> Mapping[int, Report]:
        """All layers; a router that the kernels do not know is asked between the halves of its own."""
        moe_layers = self.moe_layers
        for place, index in enumerate(moe_layers):
            layers[index].route.counts = buffers.counts_ME[place].data_ptr()
            layers[index].route.chosen = layers[index].feed.chosen = buffers.chosen_MBK[place].data_ptr()
            layers[index].route.weights = layers[index].feed.weights = buffers.weights_MBK[place].data_ptr()
        reports = {i: _counted(i, buffers.counts_ME[place], tokens) for place, i in enumerate(moe_layers)}
        first = 0
        while (first := self.kernels.layers(shared, layers, first)) < len(layers):
            reports[first] = self._ask(shared, layers[first].feed, first, buffers, tokens, options)
            first += 1
        return reports

    def _ask(
        self, shared: Pass, feed: Feed, index: int, buffers: _Buffers, tokens: Tokens, options: Options
    ) -> Report:
        block = self.model.layers[index]
        assert isinstance(block, DecoderBlock), "blocks are prepared by their class"
        assert block.moe is not None, "only routers are asked"
        moe, mode = block.moe, options.mode.at(index)
        routing = moe.decide(buffers.normed_BD, tokens, mode)
        buffers.asked[self.moe_layers.index(index)] = routing.chosen
        chosen_BK, keep_BK = routing.experts_TK.contiguous(), routing.keep_TK.contiguous()
        weights_BK = routing.weights_TK.contiguous()
        feed.chosen, feed.keep, feed.weights = (t.data_ptr() for t in (chosen_BK, keep_BK, weights_BK))
        feed.choices, feed.weight_on_input = chosen_BK.shape[1], routing.weight_on_input
        self.kernels.feed(shared, feed)
        return moe.balance(routing, tokens, replace(mode, counts_only=True))

    def logits(self, x_BD: Tensor) -> Tensor:
        """Logits [B, V] of states, each the same whatever states are beside it."""
        normed_BD = self.model.norm(x_BD) * self.model.config.logit_scale
        return self.kernels.product(self.head, normed_BD.contiguous())


@dataclass(frozen=True, slots=True)
class States:
    """What a pass leaves behind, before the head."""

    x_TD: Tensor
    """Before the last norm."""
    reports: Mapping[int, Report]
    choices: Mapping[int, int]
    """K by index of the MoE layer."""
    buffers: _Buffers

    def chosen(self) -> Mapping[int, Chosen]:
        """Where tokens went, by index of the MoE layer."""
        return {
            index: self.buffers.chosen(place, choices)
            for place, (index, choices) in enumerate(self.choices.items())
        }


@dataclass(frozen=True, slots=True)
class _Buffers:
    """What the layers of one pass write."""

    x_BD: Tensor
    normed_BD: Tensor
    chosen_MBK: Tensor
    weights_MBK: Tensor
    counts_ME: Tensor
    asked: dict[int, Chosen]
    """Of layers whose routers the kernels do not know, by their place."""

    @staticmethod
    def of(x_BD: Tensor, choices: int, moe_layers: int, experts: int) -> _Buffers:
        batch = x_BD.shape[0]
        return _Buffers(
            x_BD.contiguous(),
            torch.empty_like(x_BD, memory_format=torch.contiguous_format),
            torch.empty(moe_layers, batch, choices, dtype=torch.int64),
            torch.empty(moe_layers, batch, choices),
            torch.zeros(moe_layers, experts, dtype=torch.int64),
            {},
        )

    def chosen(self, place: int, choices: int) -> Chosen:
        """Where the tokens of a layer went, which may have fewer choices than others."""
        if place in self.asked:
            return self.asked[place]
        batch = len(self.x_BD)
        both = (values[place].flatten()[: batch * choices] for values in (self.chosen_MBK, self.weights_MBK))
        experts_BK, weights_BK = (values.view(batch, choices) for values in both)
        return Chosen(experts_BK, weights_BK)


def _counted(index: int, counts_E: Tensor, tokens: Tokens) -> Report:
    return Report(index, {}, counts_E, counts_E, tokens.valid_T.sum(), None)


def _shared(buffers: _Buffers, context: Context, *, many: bool) -> Pass:
    return Pass(
        torch.get_num_threads(),
        *buffers.x_BD.shape,
        many,
        *(t.data_ptr() for t in (buffers.x_BD, buffers.normed_BD)),
        *(t.data_ptr() for t in (context.cos_BSR, context.sin_BSR, context.position_BS)),
    )


def _fill(attend: Attend, view: View) -> None:
    """Where a layer's cached rows are; the view has to stay alive."""
    storage_NPX, table_BM = view.storage_NPX, view.table_BM
    attend.storage, attend.cache_type = storage_NPX.data_ptr(), CACHES[storage_NPX.dtype]
    attend.page, attend.row, attend.slots = *storage_NPX.stride()[:2], storage_NPX.shape[1]
    if table_BM is not None:
        attend.table, attend.table_width = table_BM.data_ptr(), table_BM.stride(0)


def _layer(block: DecoderBlock) -> Layer:
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
            raise _Unknown


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
    call.query, call.keys, call.values = (_linear(part) for part in (attention.q, attention.k, attention.v))
    call.output = _linear(attention.o)
    call.query_norm, call.key_norm = _norm(attention.q_norm), _norm(attention.k_norm)
    return call


def _latent(call: Attend, attention: LatentAttention) -> Attend:
    config = attention.config
    call.heads, call.nope, call.pairs = config.heads, config.nope_dim, config.rope_dim // 2
    call.value, call.rank = config.v_dim, config.kv_rank
    call.interleaved, call.scale = config.rope.interleaved, config.softmax_scale
    if config.q_rank is None:
        call.query = _linear(attention.q)
    else:
        call.query, call.query_up = _linear(attention.q_down), _linear(attention.q_up)
        call.query_norm = _norm(attention.q_norm)
    call.keys, call.output = _linear(attention.kv_down), _linear(attention.o)
    call.latent_up = _matrix(attention.kv_up.matrix)
    call.key_norm = _norm(attention.kv_norm)
    return call


def _experts(feed: Feed, moe: MoELayer) -> None:
    if not moe.whole:
        raise _Unknown
    feed.experts, _, feed.width = moe.experts.down_stack.shape
    feed.up, feed.down = (_known(s.native()) for s in (moe.experts.up_stack, moe.experts.down_stack))
    feed.activation = ACTIVATIONS[moe.experts.activation]
    match moe.shared:
        case DenseNetwork():
            _share(feed, moe.shared)
        case GatedNetwork():
            feed.shared_gate = _linear(moe.shared.gate)
            _share(feed, moe.shared)
        case Nobody():
            pass
        case _:
            raise _Unknown


def _share(feed: Feed, network: DenseNetwork | GatedNetwork) -> None:
    """A network that all tokens visit."""
    feed.shared_up, feed.shared_down = _linear(network.up), _linear(network.down)
    feed.shared_width = feed.shared_down.columns
    feed.activation = ACTIVATIONS[network.activation]


def _linear(linear: Linear) -> NativeMatrix:
    return _matrix(linear.matrix, linear.bias)


def _matrix(matrix: Matrix, bias_O: Tensor | None = None) -> NativeMatrix:
    return _known(matrix.native(bias_O))


def _norm(module: nn.Module) -> NativeNorm:
    if isinstance(module, RMSNorm):
        return _known(native_norm(module.weight, module.epsilon))
    return _known(native_norm(None))


def _known(part: _Part | None) -> _Part:
    if part is None:
        raise _Unknown
    return part
