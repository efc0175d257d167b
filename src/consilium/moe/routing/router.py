"""The router: project, perturb, score, select, weigh. One routing rule for every published system.

Legend: T tokens, D hidden size, G groups, E experts, K most experts a token may use, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from consilium.config.router import Hash, Jitter, LearnedNoise, LinearGate, MLPGate, NoGate, TwoLevel
from consilium.config.router import Router as RouterConfig
from consilium.moe.routing.chance import chance, joint_chance
from consilium.moe.routing.gate import Gate, Level, TanhGate, ZeroGate, joint, level
from consilium.moe.routing.score import score, transform
from consilium.moe.routing.select import Choice, Evidence, choose, drawn_table, hash_table, used_groups
from consilium.moe.routing.weigh import weigh
from consilium.moe.types import LayerMode, Routing, Tokens
from consilium.ops.exact import no_autocast
from consilium.ops.weights import Matrix


@dataclass(frozen=True, slots=True)
class _Logits:
    """What the gates say: the secondary of experts and, where there are two levels, the primary of groups."""

    secondary: Level
    primary: Level | None

    @property
    def clean_TE(self) -> Tensor:
        secondary_TE = self.secondary.clean_TN
        return secondary_TE if self.primary is None else joint(self.primary.clean_TN, secondary_TE)

    @property
    def noisy_TE(self) -> Tensor:
        secondary_TE = self.secondary.noisy_TN
        return secondary_TE if self.primary is None else joint(self.primary.noisy_TN, secondary_TE)


@final
class Router(nn.Module):
    """Decides which experts each token uses and with what weight. Float32 end to end, autocast or not.

    Parameters: ``projection``, ``noise`` where learned; where there are two levels, ``primary`` and
    ``primary_noise`` for groups. All start at zero: the model initialises or loads them. The buffer ``table``
    int64 [V, k] is a hash router's and saved with the weights: they are trained for it and no other.
    """

    def __init__(self, config: RouterConfig, hidden_size: int, experts: int) -> None:
        super().__init__()
        self.config = config
        noisy = isinstance(config.noise, LearnedNoise)
        groups = config.select.groups if isinstance(config.select, TwoLevel) else None
        self.projection = _projection(config, hidden_size, experts)
        self.noise = Gate(hidden_size, experts) if noisy else None
        self.primary = Gate(hidden_size, groups) if groups else None
        self.primary_noise = Gate(hidden_size, groups) if groups and noisy else None
        table_VK = hash_table(config.select, experts) if isinstance(config.select, Hash) else None
        self.register_buffer("table", table_VK)
        self.table: Tensor | None

    @property
    def linear(self) -> tuple[Matrix, Tensor | None] | None:
        """The matrix and the bias that logits are made with outside training, where they are all."""
        gate = self.projection
        return (gate.matrix, gate.bias) if isinstance(gate, Gate) and self.primary is None else None

    def forward(self, x_TD: Tensor, bias_E: Tensor | None, tokens: Tokens, mode: LayerMode) -> Routing:
        """Route flat tokens [T, D]. ``bias_E`` float32 shifts the selection only, never the weights.

        NaN in a logit is not hidden: it is selected and weighs NaN, so that the output shows it. Padded rows
        keep nothing but must be finite, since zero times NaN would reach the gate's gradient.
        """
        config = self.config
        with no_autocast(x_TD):
            logits = self._logits(x_TD.float(), mode)
            clean_TE, logits_TE = logits.clean_TE, transform(logits.noisy_TE, config.transforms)
            scores_TE = score(logits_TE, config.score)
            values_TE = self._selection(logits_TE, scores_TE, bias_E)
            primary_TG = None if logits.primary is None else logits.primary.noisy_TN.detach()
            evidence = Evidence(values_TE, scores_TE.detach(), logits_TE.detach(), primary_TG, self.table)
            choice = choose(config.select, evidence, tokens, mode)
            weights_TK = weigh(config, logits_TE, scores_TE, choice)
            chance_TE = _chance(config, logits, choice, tokens.valid_T)
        return Routing(
            logits_TE=logits_TE,
            scores_TE=scores_TE,
            experts_TK=choice.experts_TK,
            weights_TK=weights_TK,
            considered_TK=choice.considered_TK,
            wanted_TK=choice.wanted_TK,
            keep_TK=choice.wanted_TK,
            clean_TE=clean_TE,
            chance_TE=chance_TE,
            weight_on_input=config.weight_on == "input",
            values_TE=values_TE,
        )

    def _logits(self, x_TD: Tensor, mode: LayerMode) -> _Logits:
        """Clean and noisy logits. Noise in training only; jitter is one draw for both levels."""
        noise = self.config.noise
        if isinstance(noise, Jitter) and mode.training:
            low, high = 1 - noise.epsilon, 1 + noise.epsilon
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(low, high, generator=mode.generator)
        floor = noise.floor if isinstance(noise, LearnedNoise) else 0.0
        secondary = level(self.projection, self.noise, floor, x_TD, mode)
        if self.primary is None:
            return _Logits(secondary, None)
        return _Logits(secondary, level(self.primary, self.primary_noise, floor, x_TD, mode))

    def _selection(self, logits_TE: Tensor, scores_TE: Tensor, bias_E: Tensor | None) -> Tensor:
        """What selection compares. Not differentiated: indices have no gradient."""
        match self.config.offset:
            case "none":
                return scores_TE.detach()
            case "scores":
                assert bias_E is not None, "this router selects with a bias"
                return scores_TE.detach() + bias_E
            case "logits":
                assert bias_E is not None, "this router selects with a bias"
                return score(logits_TE.detach() + bias_E, self.config.score)


def table_of_old(config: RouterConfig, experts: int) -> Tensor:
    """The table of a hash router whose folder has none: it was drawn before tables were saved."""
    assert isinstance(config.select, Hash), "only hash routers have a table"
    return drawn_table(config.select, experts)


def _projection(config: RouterConfig, hidden_size: int, experts: int) -> Gate | TanhGate | ZeroGate:
    match config.projection:
        case LinearGate(bias=bias):
            return Gate(hidden_size, experts, bias=bias)
        case MLPGate():
            return TanhGate(hidden_size, experts)
        case NoGate():
            return ZeroGate(experts)


def _chance(config: RouterConfig, logits: _Logits, choice: Choice, valid_T: Tensor) -> Tensor | None:
    """The smooth chance of each expert [T, E], where a draw of learned noise gives it one."""
    if logits.secondary.deviation_TN is None:
        return None
    if logits.primary is None or not isinstance(config.select, TwoLevel):
        return chance(logits.secondary, choice.experts_TK.shape[1])
    used_TG = used_groups(choice, config.select.groups, logits.clean_TE.shape[1])
    keep, k = config.select.keep, config.select.k
    return joint_chance(logits.primary, logits.secondary, keep, k, used_TG, valid_T)
