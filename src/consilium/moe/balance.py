"""Balance: the losses and the report of a pass, and the control state that moves between steps.

Legend: T tokens, E experts, N devices.
"""

from __future__ import annotations

from typing import Any, Self, final

import torch
from torch import Tensor, nn

from consilium.config.balance import AdaptiveLoss, NoBias, QuantileBias
from consilium.config.balance import Balance as BalanceConfig
from consilium.config.router import Router as RouterConfig
from consilium.moe.control import memory, move
from consilium.moe.losses import entropy, sent
from consilium.moe.margins import Exact, Histogram, margins
from consilium.moe.objectives import Seen, balance_loss
from consilium.moe.types import Counted, LayerMode, Margins, Report, Routing, Taken, Tokens
from consilium.ops.exact import no_autocast


@final
class Balance(nn.Module):
    """Losses and loads are values of a pass; the bias and what moves it are state between steps.

    Buffers, float32 whatever the model's dtype: ``bias_E`` [E] where the router selects with one,
    ``coefficient`` (scalar) where a loss is adaptive, both saved with the weights; and what a bias rule keeps
    (``controls``), which a resume needs and the weights do not. In bfloat16 a bias of 2 would not move by
    0.001.
    """

    def __init__(self, config: BalanceConfig, router: RouterConfig, experts: int, layer: int = 0) -> None:
        super().__init__()
        self.config = config
        self.offset = router.offset
        self.experts = experts
        self.layer = layer
        adaptive = [loss for loss in config.losses if isinstance(loss, AdaptiveLoss)]
        biased = router.offset != "none" or not isinstance(config.bias, NoBias)
        self.register_buffer("bias_E", torch.zeros(experts) if biased else None)
        self.register_buffer("coefficient", torch.tensor(adaptive[0].start) if adaptive else None)
        self.bias_E: Tensor | None
        self.coefficient: Tensor | None
        self.adaptive = adaptive[0] if adaptive else None
        kept = memory(config.bias, experts)
        for name, value in kept.items():
            self.register_buffer(name, value, persistent=False)
        self.kept = tuple(kept)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Follow the model to a device but not to a dtype: a cast buffer comes back with its exact values."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(*args, **kwargs)
        for name, old in before.items():
            new = self.get_buffer(name)
            if new.dtype != old.dtype:
                self.register_buffer(name, old.to(new.device), persistent=name not in self.kept)
        return self

    @property
    def controls(self) -> dict[str, Tensor]:
        """What the bias rule keeps from step to step, by name: the buffers themselves."""
        return {name: self.get_buffer(name) for name in self.kept}

    def forward(self, admitted: Routing, tokens: Tokens, mode: LayerMode) -> Report:
        """Report on what the router wanted and on what admission left of it. Losses in training only.

        Losses read what was wanted, over valid tokens; those over a step add what other micro-batches and
        ranks wanted.
        """
        load_E = admitted.load_E()
        wanted_E = load_E if admitted.keep_TK is admitted.wanted_TK else admitted.wanted_E()
        counted = Counted(wanted_E, tokens.valid_T.sum(), self._sent(admitted, mode))
        if mode.counts_only:
            return Report(self.layer, {}, load_E, wanted_E, counted.tokens, None, counted.sent_N)
        with no_autocast(admitted.logits_TE):
            losses = self._losses(admitted, tokens, mode, counted) if mode.training else {}
            disorder = entropy(admitted.scores_TE.detach(), tokens.valid_T)
            beside = self._margins(admitted, tokens) if mode.training else None
        return Report(self.layer, losses, load_E, wanted_E, counted.tokens, disorder, counted.sent_N, beside)

    def _losses(
        self, admitted: Routing, tokens: Tokens, mode: LayerMode, counted: Counted
    ) -> dict[str, Tensor]:
        """By kind; those of one kind are added up."""
        losses: dict[str, Tensor] = {}
        seen = Seen(admitted, tokens, mode, counted, self.config.sequence, self.coefficient)
        for loss in self.config.losses:
            value = balance_loss(loss, seen)
            losses[loss.kind] = losses[loss.kind] + value if loss.kind in losses else value
        return losses

    def _sent(self, admitted: Routing, mode: LayerMode) -> Tensor | None:
        devices = self.config.counted_devices
        if devices is None or not mode.training:
            return None
        return sent(admitted.experts_TK, admitted.wanted_TK, self.experts // devices, devices).sum(dim=0)

    @torch.no_grad()
    def _margins(self, admitted: Routing, tokens: Tokens) -> Margins | None:
        """What quantile balancing reads of a pass: margins of what the router compared."""
        rule, bias_E = self.config.bias, self.bias_E
        if not isinstance(rule, QuantileBias):
            return None
        assert bias_E is not None, "a rule moves a bias"
        values_TE = admitted.logits_TE if self.offset == "logits" else admitted.scores_TE
        margins_TE = margins(values_TE.detach() + bias_E, tokens.valid_T, admitted.experts_TK.shape[1])
        match rule.statistics:
            case "exact":
                return Exact((margins_TE,))
            case "histogram":
                return Histogram.of(margins_TE, tokens.valid_T)

    @torch.no_grad()
    def step(self, taken: Taken) -> None:
        """Move the control state once, after an optimizer step, by what the router wanted.

        A step without tokens changes nothing.
        """
        if taken.wanted_E.sum() == 0:
            return
        if self.bias_E is not None and taken.progress < self.config.bias_until:
            assert self.bias_E.dtype == torch.float32, "the selection bias is float32"
            move(self.config.bias, self.bias_E, self.controls, taken)
        if self.adaptive is not None and self.coefficient is not None:
            # Skywork-MoE equations 5 and 6.
            target = min(self.adaptive.slope * taken.dropped_fraction, self.adaptive.most)
            self.coefficient.lerp_(self.coefficient.new_tensor(target), 1 - self.adaptive.momentum)
