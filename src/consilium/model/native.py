"""Passes over a cache by the native kernels: one call for all layers whose router they know.

Legend: B sequences, D hidden size, K choices a token, E experts, M MoE layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from consilium.attention.context import tables_of
from consilium.config.model import Model
from consilium.kv.types import Cache, View
from consilium.model.block import DecoderBlock
from consilium.model.decoder import Decoder
from consilium.model.mtp import MTPModule
from consilium.model.native_blocks import Unknown, layer_of, linear_of, matrix_of
from consilium.model.types import Inputs, Options, Output
from consilium.moe.types import Chosen, Report, Tokens
from consilium.ops.native.library import (
    CACHES,
    TYPES,
    Attend,
    Kernels,
    Layer,
    NativeMatrix,
    Pass,
    kernels,
)


@final
@dataclass(frozen=True, slots=True)
class NativeBlocks:
    """Blocks that follow one another."""

    config: Model
    blocks: tuple[DecoderBlock, ...]
    kernels: Kernels
    layers: tuple[Layer, ...]
    """Without the cache and what a pass writes."""

    @staticmethod
    def of(config: Model, blocks: Iterable[nn.Module], kernels: Kernels) -> NativeBlocks:
        """Raises Unknown for a part that the kernels do not read."""
        known = tuple(block for block in blocks if isinstance(block, DecoderBlock))
        return NativeBlocks(config, known, kernels, tuple(layer_of(block) for block in known))

    @property
    def choices(self) -> int:
        """K, the most of any layer whose router the kernels know."""
        return max(layer.route.choices for layer in self.layers)

    @property
    def experts(self) -> int:
        """E; 0 in a model without."""
        return max(layer.feed.experts for layer in self.layers)

    @property
    def moe_places(self) -> tuple[int, ...]:
        """Places of the blocks with experts among these."""
        return tuple(place for place, layer in enumerate(self.layers) if layer.feed.experts)

    def run(self, x_TD: Tensor, inputs: Inputs, cache: Cache, options: Options, *, many: bool) -> States:
        """After all blocks: a token of each sequence, or ``many``, the tokens of a part of a prompt."""
        position_BS = inputs.positions().contiguous()
        slots, tables = int(position_BS.max()) + 1, tables_of(self.config.attention, position_BS)
        buffers = _Buffers.of(x_TD.float(), self.choices, len(self.moe_places), self.experts)
        shared = _shared(buffers, (*tables, position_BS), many=many)
        layers = (Layer * len(self.layers))(*self.layers)
        views = [cache.layer(block.layer).view(slots) for block in self.blocks]
        for layer, view in zip(layers, views, strict=True):
            _fill(layer.attend, view)
            layer.routed = layer.routed and options.mode.override is None
        reports = self._run(shared, layers, buffers, inputs.tokens(), options)
        choices = {self.blocks[place].layer: layers[place].feed.choices for place in self.moe_places}
        return States(buffers.x_BD, reports, choices, buffers)

    def _run(
        self, shared: Pass, layers: ctypes.Array[Layer], buffers: _Buffers, tokens: Tokens, options: Options
    ) -> Mapping[int, Report]:
        """All layers; a router that the kernels do not know is asked between the halves of its own."""
        reports: dict[int, Report] = {}
        valid = tokens.valid_T.sum()
        for place, (chosen_BK, weights_BK, second_B, margin_B, counts_E) in zip(
            self.moe_places, buffers.by_layer(), strict=True
        ):
            layer, index = layers[place], self.blocks[place].layer
            layer.route.counts = counts_E.data_ptr()
            layer.route.chosen = layer.feed.chosen = chosen_BK.data_ptr()
            layer.route.weights = layer.feed.weights = weights_BK.data_ptr()
            if options.routings:
                layer.route.second, layer.route.margin = second_B.data_ptr(), margin_B.data_ptr()
            reports[index] = Report(index, {}, counts_E, counts_E, valid, None)
        first = 0
        while (first := self.kernels.layers(shared, layers, first)) < len(layers):
            reports[self.blocks[first].layer] = self._ask(shared, layers, first, buffers, tokens, options)
            first += 1
        return reports

    def _ask(
        self,
        shared: Pass,
        layers: ctypes.Array[Layer],
        place: int,
        buffers: _Buffers,
        tokens: Tokens,
        options: Options,
    ) -> Report:
        block, feed = self.blocks[place], layers[place].feed
        assert block.moe is not None, "only routers are asked"
        moe, mode = block.moe, options.mode.at(block.layer)
        routing = moe.decide(buffers.normed_BD, tokens, mode)
        buffers.asked[self.moe_places.index(place)] = routing.chosen
        chosen_BK, keep_BK = routing.experts_TK.contiguous(), routing.keep_TK.contiguous()
        weights_BK = routing.weights_TK.contiguous()
        feed.chosen, feed.keep, feed.weights = (t.data_ptr() for t in (chosen_BK, keep_BK, weights_BK))
        feed.choices, feed.weight_on_input = chosen_BK.shape[1], routing.weight_on_input
        self.kernels.feed(shared, feed)
        return moe.balance(routing, tokens, replace(mode, counts_only=True))


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
    blocks: NativeBlocks
    head: NativeMatrix

    @staticmethod
    def of(model: Decoder) -> NativeDecoder | None:
        """Prepare ``model``; None where there are no kernels, or it has a part that they do not read."""
        found = kernels()
        if found is None:
            return None
        try:
            blocks = NativeBlocks.of(model.config, model.layers, found)
            head = matrix_of((model.embed if model.config.tied else model.head).matrix)
        except Unknown:
            return None
        return NativeDecoder(model, blocks, head)

    @property
    def reads_prompts(self) -> bool:
        """Whether ``read`` is for this model, and the faster way: MKL is best at products of float32.

        Where all tokens decide together who goes where, parts are another answer than the whole.
        """
        moe = self.model.config.moe
        narrow = self.blocks.layers[0].attend.output.type != TYPES[torch.float32]
        return narrow and (moe is None or moe.causal)

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
        x_TD = self.model.embedded(inputs.ids_BS, options).flatten(0, 1)
        return self.blocks.run(x_TD, inputs, cache, options, many=many)

    def logits(self, x_BD: Tensor) -> Tensor:
        """Logits [B, V] of states, each the same whatever states are beside it."""
        return self.vocabulary(self.model.norm(x_BD))

    def vocabulary(self, normed_BD: Tensor) -> Tensor:
        """Logits [B, V] of states after their norm."""
        return self.blocks.kernels.product(
            self.head, (normed_BD * self.model.config.logit_scale).contiguous()
        )


@final
@dataclass(frozen=True, slots=True)
class NativeModule:
    """The values of an ``MTPModule`` with a cache."""

    module: MTPModule
    blocks: NativeBlocks
    project: NativeMatrix

    @staticmethod
    def of(module: MTPModule, decoder: NativeDecoder) -> NativeModule | None:
        """None where it has a part that the kernels do not read, though they read the model."""
        try:
            blocks = NativeBlocks.of(decoder.model.config, [module.block], decoder.blocks.kernels)
            return NativeModule(module, blocks, linear_of(module.project))
        except Unknown:
            return None

    def states(
        self,
        hidden_TD: Tensor,
        embedded_TD: Tensor,
        inputs: Inputs,
        cache: Cache,
        options: Options,
        *,
        many: bool,
    ) -> Tensor:
        """Its states [T, D] after their norm."""
        both_TD = self.module.joined(hidden_TD.float(), embedded_TD.float())
        x_TD = self.blocks.kernels.product(self.project, both_TD.contiguous())
        return self.module.norm(self.blocks.run(x_TD, inputs, cache, options, many=many).x_TD)


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
        """Where tokens went, by index of the MoE layer; of a pass whose options ask for routings."""
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
    second_MB: Tensor
    margin_MB: Tensor
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
            torch.empty(moe_layers, batch, dtype=torch.int64),
            torch.empty(moe_layers, batch),
            torch.zeros(moe_layers, experts, dtype=torch.int64),
            {},
        )

    def by_layer(self) -> Iterator[tuple[Tensor, ...]]:
        """Choices, weights, runners-up, margins and counts of each layer with experts."""
        kinds = self.chosen_MBK, self.weights_MBK, self.second_MB, self.margin_MB, self.counts_ME
        return zip(*(kind.unbind() for kind in kinds), strict=True)

    def chosen(self, place: int, choices: int) -> Chosen:
        """Where the tokens of a layer went, which may have fewer choices than others."""
        if place in self.asked:
            return self.asked[place]
        batch = len(self.x_BD)
        both = (values[place].flatten()[: batch * choices] for values in (self.chosen_MBK, self.weights_MBK))
        experts_BK, weights_BK = (values.view(batch, choices) for values in both)
        return Chosen(experts_BK, weights_BK, self.second_MB[place], self.margin_MB[place])


def _shared(buffers: _Buffers, places: tuple[Tensor, Tensor, Tensor], *, many: bool) -> Pass:
    """``places`` are cosines, sines and positions, which have to stay alive."""
    return Pass(
        torch.get_num_threads(),
        *buffers.x_BD.shape,
        many,
        *(t.data_ptr() for t in (buffers.x_BD, buffers.normed_BD)),
        *(t.data_ptr() for t in places),
    )


def _fill(attend: Attend, view: View) -> None:
    """Where a layer's cached rows are; the view has to stay alive."""
    storage_NPX, table_BM = view.storage_NPX, view.table_BM
    attend.storage, attend.cache_type = storage_NPX.data_ptr(), CACHES[storage_NPX.dtype]
    attend.page, attend.row, attend.slots = *storage_NPX.stride()[:2], storage_NPX.shape[1]
    if table_BM is not None:
        attend.table, attend.table_width = table_BM.data_ptr(), table_BM.stride(0)
