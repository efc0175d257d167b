"""The router: project, perturb, score, select, weigh. One routing rule for every published system.

Legend: T tokens, D hidden size, E experts, K most experts a token may use, V vocabulary.
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilium.config.router import Hash, Jitter, LearnedNoise, LinearGate, MLPGate, NoNoise
from consilium.config.router import Router as RouterConfig
from consilium.moe.score import score, transform
from consilium.moe.select import choose, hash_table
from consilium.moe.types import Mode, Routing, Tokens
from consilium.moe.weigh import weigh


@final
class Gate(nn.Module):
    """A linear map computed in float32 whatever dtype its parameters and input have.

    A gate in bfloat16 sends 3 to 13 % of tokens to other experts (megablocks and vLLM both shipped that).
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight.float(), None if self.bias is None else self.bias.float())


@final
class TanhGate(nn.Module):
    """tanh(x W1) W2, both without bias (LLaMA-MoE)."""

    def __init__(self, inputs: int, experts: int) -> None:
        super().__init__()
        self.hidden = Gate(inputs, experts)
        self.output = Gate(experts, experts)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.output(torch.tanh(self.hidden(x_TD)))


@final
class Router(nn.Module):
    """Decides which experts each token uses and with what weight. Float32 end to end, autocast or not.

    Parameters: ``projection`` (and ``noise`` where learned) start at zero, as Shazeer 2017 section 4 asks for
    learned noise; for any other system the model initialises the projection. ``table`` is a hash router's.
    """

    def __init__(self, config: RouterConfig, hidden_size: int, experts: int) -> None:
        super().__init__()
        self.config = config
        match config.projection:
            case LinearGate(bias=bias):
                self.projection = Gate(hidden_size, experts, bias=bias)
            case MLPGate():
                self.projection = TanhGate(hidden_size, experts)
        self.noise = Gate(hidden_size, experts) if isinstance(config.noise, LearnedNoise) else None
        table_VK = hash_table(config.select, experts) if isinstance(config.select, Hash) else None
        self.register_buffer("table", table_VK, persistent=False)
        self.table: Tensor | None

    def forward(self, x_TD: Tensor, bias_E: Tensor | None, tokens: Tokens, mode: Mode) -> Routing:
        """Route flat tokens [T, D]. ``bias_E`` float32 shifts the selection only, never the weights.

        NaN in a logit is not hidden: it is selected and weighs NaN, so that the output shows it. Padded rows
        keep nothing but must be finite, since zero times NaN would reach the gate's gradient.
        """
        config = self.config
        with torch.autocast(x_TD.device.type, enabled=False):
            clean_TE, noisy_TE, noise_TE = self._logits(x_TD.float(), mode)
            logits_TE = transform(noisy_TE, config.transforms)
            scores_TE = score(logits_TE, config.score)
            values_TE = self._selection(logits_TE, scores_TE, bias_E)
            choice = choose(config.select, values_TE, scores_TE.detach(), self.table, tokens, mode)
            weights_TK = weigh(config.weight, config.scale, logits_TE, scores_TE, choice)
        return Routing(
            logits_TE=logits_TE,
            scores_TE=scores_TE,
            experts_TK=choice.experts_TK,
            weights_TK=weights_TK,
            keep_TK=choice.keep_TK,
            clean_TE=clean_TE,
            noise_TE=noise_TE,
            weight_on_input=config.weight_on == "input",
        )

    def _logits(self, x_TD: Tensor, mode: Mode) -> tuple[Tensor, Tensor, Tensor | None]:
        """Clean logits, noisy logits, and the standard deviation of learned noise. Noise in training only."""
        match self.config.noise:
            case NoNoise():
                clean_TE = self.projection(x_TD)
                return clean_TE, clean_TE, None
            case Jitter(epsilon=epsilon):
                if mode.training:
                    factor_TD = torch.empty_like(x_TD).uniform_(
                        1 - epsilon, 1 + epsilon, generator=mode.generator
                    )
                    x_TD = x_TD * factor_TD
                clean_TE = self.projection(x_TD)
                return clean_TE, clean_TE, None
            case LearnedNoise(floor=floor):
                assert self.noise is not None, "learned noise needs its matrix"
                clean_TE = self.projection(x_TD)
                noise_TE = F.softplus(self.noise(x_TD)) + floor
                if not mode.training:
                    return clean_TE, clean_TE, noise_TE
                normal_TE = torch.empty_like(clean_TE).normal_(generator=mode.generator)
                return clean_TE, clean_TE + normal_TE * noise_TE, noise_TE

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
