"""The decoder: embedding, blocks, norm, head; every system of the catalogue is this class with other parts.

Legend: B sequences, S tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from consilium.attention.context import build_context
from consilium.attention.types import Context
from consilium.config.generation import GenerationDefaults
from consilium.config.model import Model
from consilium.errors import ConsiliumError
from consilium.kv.types import Cache
from consilium.model.block import Block, branch_generator, build_block
from consilium.model.mtp import MTPModule, shifted
from consilium.model.types import BlockResult, Hidden, Inputs, Options, Output
from consilium.moe.layer import MoELayer
from consilium.moe.types import Mode, Tokens
from consilium.ops.linear import Linear
from consilium.ops.loss import linear_cross_entropy
from consilium.ops.norm import RMSNorm


@final
class Decoder(nn.Module):
    """A language model. ``model(tokens_BS)`` returns logits [B, S, V] and one report a MoE layer.

    Build it with ``consilium.build``. Modules hold weights and balance state only: what a pass measures is
    in what it returns. ``generation`` is what the files that it was loaded from say of ending and sampling.
    """

    def __init__(self, config: Model, generation: GenerationDefaults = GenerationDefaults()) -> None:
        super().__init__()
        self.config = config
        self.generation = generation
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(build_block(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        if not config.tied:
            self.head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(MTPModule(config, k) for k in range(config.mtp.depth))

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the head's matrix, or the embedding's where they are tied."""
        return self.embed.weight if self.config.tied else self.head.weight

    def forward(
        self, tokens: Tensor | Inputs, *, cache: Cache | None = None, options: Options = Options()
    ) -> Output:
        """Return float32 logits for token ids [B, S] or ``Inputs``; multi-token prediction does not run."""
        hidden = self.hidden(
            tokens if isinstance(tokens, Inputs) else Inputs(tokens), cache=cache, options=options
        )
        return Output(self.logits(hidden.final_BSD), hidden.reports, hidden.routings)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Float32 logits [..., V] of states [..., D] after the last norm."""
        return F.linear(self._scaled(hidden_BSD), self.head_weight.to(hidden_BSD.dtype)).float()

    def nll(self, hidden_BSD: Tensor, targets_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of -log softmax(logits)[target] in nats and how many targets there are (those not -1).

        The logits of all tokens are never held at once.
        """
        return linear_cross_entropy(
            self._scaled(hidden_BSD).flatten(0, 1), self.head_weight, targets_BS.flatten()
        )

    def hidden(self, inputs: Inputs, *, cache: Cache | None = None, options: Options = Options()) -> Hidden:
        """Run the blocks and the last norm. ``cache`` holds earlier tokens of the same sequences.

        Raises ConsiliumError for an override that names a block without experts or does not fit the tokens.
        """
        self._check_override(options.mode)
        context = self._context(inputs, cached=cache is not None)
        tokens = inputs.tokens()
        x_BSD = self._embed(inputs.ids_BS, options)
        results: list[BlockResult] = []
        for i, block in enumerate(self.layers):
            result = _run(block, x_BSD, context, tokens, options, None if cache is None else (cache, i))
            x_BSD = result.x_BSD
            results.append(result)
        return _hidden(self.norm(x_BSD), results)

    def predict_ahead(
        self, hidden_BSD: Tensor, inputs: Inputs, *, options: Options = Options()
    ) -> tuple[Hidden, ...]:
        """Run the multi-token prediction modules on the main model's ``final_BSD``; training only.

        Module k's states predict the token k + 1 places after the usual target; they mean something only
        where that token is in the same document.
        """
        outputs: list[Hidden] = []
        for k, module in enumerate(self.mtp):
            assert isinstance(module, MTPModule)
            ahead = shifted(inputs, k + 1)
            x_BSD = module.merge(hidden_BSD, self._embed(ahead.ids_BS, options))
            result = _run(
                module.block, x_BSD, self._context(ahead, cached=False), ahead.tokens(), options, None
            )
            hidden_BSD = module.norm(result.x_BSD)
            outputs.append(_hidden(hidden_BSD, [result]))
        return tuple(outputs)

    def moe_layers(self) -> Mapping[int, MoELayer]:
        """Every MoE layer by its index, multi-token prediction modules included."""
        return {m.layer: m for m in self.modules() if isinstance(m, MoELayer)}

    def _check_override(self, mode: Mode) -> None:
        if isinstance(mode.override, Mapping):
            layers = sorted(self.moe_layers())
            wrong = sorted(set(mode.override) - set(layers))
            if wrong:
                raise ConsiliumError(
                    f"override names layer {wrong[0]}, which has no experts; the MoE layers are {layers}."
                )

    def _embed(self, ids_BS: Tensor, options: Options) -> Tensor:
        x_BSD = self.embed(ids_BS)
        x_BSD = x_BSD if options.dtype is None else x_BSD.to(options.dtype)
        # A factor in the dtype of the states, as Grok-1 rounds it: 78.38 is 78.5 in bfloat16.
        return x_BSD * x_BSD.new_tensor(self.config.embedding_scale)

    def _scaled(self, hidden_BSD: Tensor) -> Tensor:
        """States whose products with the head are logits: a factor of D values instead of V."""
        return hidden_BSD * self.config.logit_scale

    def _context(self, inputs: Inputs, *, cached: bool) -> Context:
        return build_context(
            self.config.attention,
            inputs.positions(),
            sequence_BS=inputs.sequence_BS,
            valid_BS=inputs.valid_BS,
            cached=cached,
        )


def _run(
    block: nn.Module,
    x_BSD: Tensor,
    context: Context,
    tokens: Tokens,
    options: Options,
    cache: tuple[Cache, int] | None,
) -> BlockResult:
    assert isinstance(block, Block)
    seed = branch_generator(options.mode.generator)
    layer_cache = None if cache is None else cache[0].layer(cache[1])

    def call(x_BSD: Tensor) -> BlockResult:
        generator = None if seed is None else torch.Generator(x_BSD.device).manual_seed(seed)
        mode = dataclasses.replace(options.mode, generator=generator)
        return block(x_BSD, context, tokens, mode, layer_cache)

    if options.recompute and torch.is_grad_enabled():
        return checkpoint(call, x_BSD, use_reentrant=False)
    return call(x_BSD)


def _hidden(final_BSD: Tensor, results: list[BlockResult]) -> Hidden:
    return Hidden(
        final_BSD=final_BSD,
        reports=tuple(r.report for r in results if r.report is not None),
        routings=tuple(r.routing for r in results if r.routing is not None),
    )
