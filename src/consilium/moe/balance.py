"""Balance: the losses and the report of a pass, and the control state that moves between steps.

Legend: T tokens, E experts, K choices a token, S segments.
"""

from __future__ import annotations

from typing import Any, Literal, Self, final

import torch
from torch import Tensor, nn

from consilium.config.balance import (
    AdaptiveLoss,
    BalanceLoss,
    CommunicationLoss,
    DeviceLoss,
    ImportanceLoss,
    LinearBias,
    LoadLoss,
    NoBias,
    SequenceLoss,
    SignBias,
    SwitchLoss,
    ZLoss,
)
from consilium.config.balance import Balance as BalanceConfig
from consilium.config.router import Router as RouterConfig
from consilium.moe.losses import (
    Segments,
    by_sequence,
    communication_loss,
    device_loss,
    entropy,
    expert_loss,
    importance_loss,
    load_fractions,
    load_loss,
    normalised,
    sent_fractions,
    uniformity_loss,
    whole_batch,
    z_loss,
)
from consilium.moe.ordering import highest
from consilium.moe.types import LayerMode, Report, Routing, Tokens
from consilium.ops.exact import no_autocast


@final
class Balance(nn.Module):
    """Losses and loads are values of a pass; the bias and the adaptive coefficient are state between steps.

    Buffers, persistent and float32 whatever the model's dtype: ``bias_E`` [E] where the router selects with
    one, ``coefficient`` (scalar) where a loss is adaptive. In bfloat16 a bias of 2 would not move by 0.001.
    """

    def __init__(self, config: BalanceConfig, router: RouterConfig, experts: int, layer: int = 0) -> None:
        super().__init__()
        self.config = config
        self.experts = experts
        self.layer = layer
        adaptive = [loss for loss in config.losses if isinstance(loss, AdaptiveLoss)]
        biased = router.offset != "none" or not isinstance(config.bias, NoBias)
        self.register_buffer("bias_E", torch.zeros(experts) if biased else None)
        self.register_buffer("coefficient", torch.tensor(adaptive[0].start) if adaptive else None)
        self.bias_E: Tensor | None
        self.coefficient: Tensor | None
        self.adaptive = adaptive[0] if adaptive else None

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Follow the model to a device but not to a dtype: a cast buffer comes back with its exact values."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(*args, **kwargs)
        for name, old in before.items():
            new = self.get_buffer(name)
            if new.dtype != old.dtype:
                self.register_buffer(name, old.to(new.device))
        return self

    def forward(self, admitted: Routing, tokens: Tokens, mode: LayerMode) -> Report:
        """Report on what the router wanted and on what admission left of it. Losses in training only.

        Losses read what was wanted, over valid tokens; those of global scope add what earlier micro-batches
        of the step wanted.
        """
        losses: dict[str, Tensor] = {}
        disorder: Tensor | None = None
        with no_autocast(admitted.logits_TE):
            if mode.training:
                for loss in self.config.losses:
                    value = self._loss(loss, admitted, tokens, mode)
                    losses[loss.kind] = losses[loss.kind] + value if loss.kind in losses else value
            if not mode.counts_only:
                disorder = entropy(admitted.scores_TE.detach(), tokens.valid_T)
        load_E = admitted.load_E()
        wanted_E = load_E if admitted.keep_TK is admitted.wanted_TK else admitted.wanted_E()
        return Report(self.layer, losses, load_E, wanted_E, tokens.valid_T.sum(), disorder)

    def _loss(self, loss: BalanceLoss, routing: Routing, tokens: Tokens, mode: LayerMode) -> Tensor:
        match loss:
            case SwitchLoss(coefficient=coefficient):
                return coefficient * self._switch(loss, routing, tokens, mode.earlier_E)
            case SequenceLoss(coefficient=coefficient):
                return coefficient * self._sequence(loss, routing, tokens, mode)
            case DeviceLoss(coefficient=coefficient, devices=devices, scope=scope):
                segments = self._segments(tokens, scope, mode)
                f_SE, p_SE = self._shares(routing, segments)
                return coefficient * device_loss(f_SE, p_SE, devices, segments)
            case CommunicationLoss(coefficient=coefficient):
                return coefficient * self._communication(loss, routing, tokens, mode)
            case ImportanceLoss(coefficient=coefficient):
                return coefficient * importance_loss(routing.experts_TK, routing.weights_TK, self.experts)
            case LoadLoss(coefficient=coefficient):
                assert routing.chance_TE is not None, "the load loss needs learned noise"
                return coefficient * load_loss(routing.chance_TE, tokens.valid_T)
            case ZLoss(coefficient=coefficient):
                return coefficient * z_loss(routing.clean_TE, tokens.valid_T)
            case AdaptiveLoss():
                assert self.coefficient is not None, "an adaptive loss has a coefficient"
                segments = whole_batch(tokens)
                p_SE = segments.means(normalised(routing.scores_TE))
                return self.coefficient * uniformity_loss(p_SE, segments)

    def _segments(self, tokens: Tokens, scope: Literal["batch", "sequence"], mode: LayerMode) -> Segments:
        """What losses are averaged over; ``config.sequence`` says what a sequence is."""
        if scope == "batch":
            return whole_batch(tokens)
        match self.config.sequence:
            case "document":
                return by_sequence(tokens, tokens.sequence_T, mode.documents)
            case "row":
                return by_sequence(tokens, tokens.sequence_T if tokens.row_T is None else tokens.row_T)

    def _shares(self, routing: Routing, segments: Segments) -> tuple[Tensor, Tensor]:
        """Load fractions f and mean probabilities P [S, E]; P over all experts, not only those chosen."""
        f_SE = load_fractions(routing.experts_TK, routing.wanted_TK, self.experts, segments)
        return f_SE, segments.means(normalised(routing.scores_TE))

    def _switch(self, loss: SwitchLoss, routing: Routing, tokens: Tokens, earlier_E: Tensor | None) -> Tensor:
        segments = whole_batch(tokens)
        match loss.counts:
            case "all":
                experts_TK, wanted_TK = routing.experts_TK, routing.wanted_TK
            case "first":
                experts_TK, wanted_TK = routing.experts_TK[:, :1], routing.wanted_TK[:, :1]
        also_E = earlier_E if loss.scope == "global" else None
        f_SE = load_fractions(experts_TK, wanted_TK, self.experts, segments, also_E)
        return expert_loss(f_SE, segments.means(normalised(routing.scores_TE)), segments)

    def _sequence(self, loss: SequenceLoss, routing: Routing, tokens: Tokens, mode: LayerMode) -> Tensor:
        segments = self._segments(tokens, "sequence", mode)
        match loss.counts:
            case "routed":
                experts_TK, wanted_TK = routing.experts_TK, routing.wanted_TK
            case "scores":
                # DeepSeek-V3 equation 18 as printed: the top k of the scores without bias.
                experts_TK = highest(routing.scores_TE.detach(), routing.experts_TK.shape[1])
                wanted_TK = tokens.valid_T[:, None].expand_as(experts_TK)
        f_SE = load_fractions(experts_TK, wanted_TK, self.experts, segments)
        return expert_loss(f_SE, segments.means(normalised(routing.scores_TE)), segments)

    def _communication(
        self, loss: CommunicationLoss, routing: Routing, tokens: Tokens, mode: LayerMode
    ) -> Tensor:
        segments = self._segments(tokens, loss.scope, mode)
        size = self.experts // loss.devices
        sent_SN = sent_fractions(routing.experts_TK, routing.wanted_TK, size, loss.devices, segments)
        p_SE = segments.means(normalised(routing.scores_TE))
        return communication_loss(sent_SN, p_SE, loss.most, segments)

    @torch.no_grad()
    def step(self, wanted_E: Tensor, dropped_fraction: float = 0.0) -> None:
        """Move the control state once, after an optimizer step, by what the router wanted.

        ``wanted_E`` int64 counts and ``dropped_fraction`` in [0, 1] cover the whole step: every micro-batch
        and rank, without padding, evaluation or recomputation. A step without tokens changes nothing. Counts
        after drops would not do: a capacity cuts every wanted expert to the same load, and the mean with it.
        """
        total = wanted_E.sum()
        if self.bias_E is not None:
            assert self.bias_E.dtype == torch.float32, "the selection bias is float32"
            # Over the sum: count - mean is exact in integers as E * count - total.
            excess_E = (wanted_E * self.experts - total).to(self.bias_E.device)
            match self.config.bias:
                case NoBias():
                    pass
                case SignBias(rate=rate):
                    self.bias_E -= rate * excess_E.sign()
                case LinearBias(rate=rate):
                    self.bias_E -= rate * excess_E / total.clamp_min(1)
        if self.adaptive is not None and self.coefficient is not None and total > 0:
            # Skywork-MoE equations 5 and 6.
            target = min(self.adaptive.slope * dropped_fraction, self.adaptive.most)
            self.coefficient.lerp_(self.coefficient.new_tensor(target), 1 - self.adaptive.momentum)
