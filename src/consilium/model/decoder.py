"""The decoder: embedding, blocks, norm, head; every system of the catalogue is this class with other parts.

Legend: B sequences, S tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final, overload

import torch
from torch import Tensor, nn

from consilium.attention.context import build_context
from consilium.attention.types import Context
from consilium.config.generation import GenerationDefaults
from consilium.config.model import Model
from consilium.errors import ConsiliumError
from consilium.kv.types import Cache
from consilium.model.block import Block, Blocks, run_block
from consilium.model.mtp import MTPModule, shifted, targets_ahead
from consilium.model.types import BlockResult, Hidden, Inputs, Losses, Objective, Options, Output
from consilium.model.vocabulary import Embed, Logits, NegativeLogLikelihood, Question, Vocabulary
from consilium.moe.layer import MoELayer
from consilium.moe.types import Mode
from consilium.ops.loss import IGNORE
from consilium.ops.norm import RMSNorm


@final
class Decoder(nn.Module):
    """A language model. ``model(tokens_BS)`` returns logits [B, S, V] and a report by MoE layer.

    Build it with ``consilium.build``. Modules hold weights and balance state only: what a pass measures is
    in what it returns. ``generation`` is what the files that it was loaded from say of ending and sampling.
    """

    def __init__(
        self,
        config: Model,
        generation: GenerationDefaults = GenerationDefaults(),
        *,
        blocks: Blocks = Block,
    ) -> None:
        super().__init__()
        self.config = config
        self.generation = generation
        self.embed = Vocabulary(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(blocks(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        if not config.tied:
            self.head = Vocabulary(config.vocab_size, config.hidden_size)
        self.mtp = nn.ModuleList(MTPModule(config, k, blocks) for k in range(config.mtp.depth))

    @property
    def dtype(self) -> torch.dtype:
        """What states are in, and weights that are not packed."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @overload
    def forward(
        self, tokens: Tensor | Inputs, *, cache: Cache | None = None, options: Options = Options()
    ) -> Output: ...

    @overload
    def forward(
        self, tokens: Tensor | Inputs, *, options: Options = Options(), objective: Objective
    ) -> Losses: ...

    def forward(
        self,
        tokens: Tensor | Inputs,
        *,
        cache: Cache | None = None,
        options: Options = Options(),
        objective: Objective | None = None,
    ) -> Output | Losses:
        """Return float32 logits for token ids [B, S] or ``Inputs``, or with an ``objective`` its losses.

        ``cache`` holds earlier tokens of the same sequences. Multi-token prediction modules run for an
        objective alone. Raises ConsiliumError for an override that names a block without experts or does not
        fit the tokens.
        """
        inputs = tokens if isinstance(tokens, Inputs) else Inputs(tokens)
        hidden = self.hidden(inputs, cache=cache, options=options)
        if objective is None:
            reports = {report.layer: report for report in hidden.reports}
            return Output(self.logits(hidden.final_BSD), reports, hidden.routings)
        ahead = self.predict_ahead(hidden.final_BSD, inputs, options=options) if objective.ahead else ()
        passes = (hidden, *ahead)
        targets = [objective.targets_BS, *(targets_ahead(objective, inputs, k) for k in range(len(ahead)))]
        nll, *further = [self._nll(p.final_BSD, t_BS) for p, t_BS in zip(passes, targets, strict=True)]
        return Losses(
            nll=nll,
            ahead=tuple(further),
            targets=(objective.targets_BS != IGNORE).sum(),
            reports={report.layer: report for p in passes for report in p.reports},
            routings={layer: routing for p in passes for layer, routing in p.routings.items()},
            largest={layer: largest_H for p in passes for layer, largest_H in p.largest.items()},
        )

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Float32 logits [..., V] of states [..., D] after the last norm."""
        return self._vocabulary(Logits(self._scaled(hidden_BSD)))

    def hidden(self, inputs: Inputs, *, cache: Cache | None = None, options: Options = Options()) -> Hidden:
        """Run the blocks and the last norm: ``forward`` without the head."""
        self._check_override(options.mode)
        context = self._context(inputs, options, cached=cache is not None)
        tokens = inputs.tokens()
        x_BSD = self.embedded(inputs.ids_BS, options)
        results: dict[int, BlockResult] = {}
        for layer, block in enumerate(self.layers):
            results[layer] = run_block(block, x_BSD, context, tokens, options, cache)
            x_BSD = results[layer].x_BSD
        return _hidden(self.norm(x_BSD), results, options)

    def predict_ahead(
        self, hidden_BSD: Tensor, inputs: Inputs, *, options: Options = Options()
    ) -> tuple[Hidden, ...]:
        """Run the multi-token prediction modules on the main model's ``final_BSD``; training only.

        Module k's states predict the token k + 1 places after the usual target; they mean something only
        where that token is in the same document.
        """
        outputs: list[Hidden] = []
        for k in range(len(self.mtp)):
            result = self.module(k, hidden_BSD, shifted(inputs, k + 1), options)
            hidden_BSD = result.x_BSD
            outputs.append(_hidden(hidden_BSD, {self.config.layers + k: result}, options))
        return tuple(outputs)

    def module(
        self, k: int, hidden_BSD: Tensor, ahead: Inputs, options: Options, cache: Cache | None = None
    ) -> BlockResult:
        """Run multi-token prediction module ``k``: token i + k + 1 is at place i of ``ahead``."""
        embedded_BSD = self.embedded(ahead.ids_BS, options)
        context = self._context(ahead, options, cached=cache is not None)
        result: BlockResult = self.mtp[k](hidden_BSD, embedded_BSD, context, ahead.tokens(), options, cache)
        return result

    @property
    def modules_ahead(self) -> tuple[MTPModule, ...]:
        """Multi-token prediction modules, from the one behind the model on."""
        return tuple(module for module in self.mtp if isinstance(module, MTPModule))

    def moe_modules(self) -> Mapping[int, MoELayer]:
        """Every MoE layer by its index, multi-token prediction modules included."""
        return {m.layer: m for m in self.modules() if isinstance(m, MoELayer)}

    def _check_override(self, mode: Mode) -> None:
        if isinstance(mode.override, Mapping):
            layers = list(self.config.moe_layers)
            wrong = sorted(set(mode.override) - set(layers))
            if wrong:
                raise ConsiliumError(
                    f"override names layer {wrong[0]}, which has no experts; the MoE layers are {layers}."
                )

    def embedded(self, ids_BS: Tensor, options: Options) -> Tensor:
        """What enters the first block: [B, S, D]."""
        x_BSD: Tensor = self.embed(Embed(ids_BS, options.dtype or self.dtype))
        # A factor in the dtype of the states, as Grok-1 rounds it: 78.38 is 78.5 in bfloat16.
        return x_BSD * x_BSD.new_tensor(self.config.embedding_scale)

    def _nll(self, hidden_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        return self._vocabulary(NegativeLogLikelihood(self._scaled(hidden_BSD), targets_BS))

    def _vocabulary(self, question: Question) -> Tensor:
        """Ask the head, which is the embedding where they are tied."""
        return self.embed(question) if self.config.tied else self.head(question)

    def _scaled(self, hidden_BSD: Tensor) -> Tensor:
        """States whose products with the head are logits: a factor of D values instead of V."""
        return hidden_BSD * self.config.logit_scale

    def _context(self, inputs: Inputs, options: Options, *, cached: bool) -> Context:
        return build_context(
            self.config.attention,
            inputs.positions(),
            sequence_BS=inputs.sequence_BS,
            valid_BS=inputs.valid_BS,
            cached=cached,
            peaks_above=options.peaks_above,
        )


def _hidden(final_BSD: Tensor, results: Mapping[int, BlockResult], options: Options) -> Hidden:
    return Hidden(
        final_BSD=final_BSD,
        reports=tuple(r.report for r in results.values() if r.report is not None),
        routings={
            layer: r.routing for layer, r in results.items() if options.routings and r.routing is not None
        },
        largest={layer: r.largest_H for layer, r in results.items() if r.largest_H is not None},
    )
