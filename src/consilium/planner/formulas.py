"""The forms of published scaling laws: loss from parameters, tokens and experts.

Legend: N parameters, D training tokens, E experts for each active one, G granularity, S share of inactive
experts, L loss in nats a token of the law's own text. What N counts differs from law to law; each says it.
All logarithms are to base ten where nothing else stands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """Ehat, the experts that count: ``start`` at one expert, ``most`` at infinitely many.

    1/Ehat = 1/(E - 1 + 1/(1/start - 1/most)) + 1/most (2202.01169; 2502.05172 uses the same form).
    """

    start: float
    most: float

    def __call__(self, experts: float) -> float:
        return 1 / (1 / self._free(experts) + 1 / self.most)

    def slope(self, experts: float) -> float:
        """Elasticity d log Ehat / d log E."""
        return experts * self(experts) / self._free(experts) ** 2

    def _free(self, experts: float) -> float:
        """What Ehat would be without its upper limit."""
        return experts - 1 + 1 / (1 / self.start - 1 / self.most)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Clark:
    """Routed language models: log L = a log N + b log Ehat + c log N log Ehat + d (2202.01169).

    N counts the parameters of the dense model whose feed-forward networks were made E experts, without
    embeddings; one expert is active (k = 1). The number of tokens is that of the fit, 130 B.
    """

    a: float
    b: float
    c: float
    d: float
    saturation: Saturation

    def loss(self, parameters: float, experts: float = 1.0) -> float:
        size, routed = math.log10(parameters), math.log10(self.saturation(experts))
        return 10 ** (self.a * size + self.b * routed + self.c * size * routed + self.d)

    def by_parameters(self, experts: float) -> float:
        """Slope d log L / d log N = a + c log Ehat; the same at every N."""
        return self.a + self.c * math.log10(self.saturation(experts))

    def by_experts(self, parameters: float, experts: float) -> float:
        """Slope d log L / d log E = (b + c log N) d log Ehat / d log E."""
        return self.raw_by_experts(parameters) * self.saturation.slope(experts)

    def raw_by_parameters(self, experts: float) -> float:
        """Slope in N when Ehat is taken to be E: a + c log E."""
        return self.a + self.c * math.log10(experts)

    def raw_by_experts(self, parameters: float) -> float:
        """Slope in E when Ehat is taken to be E: b + c log N; the same at every E."""
        return self.b + self.c * math.log10(parameters)

    def effective_parameters(self, parameters: float, experts: float) -> float:
        """Parameters of the dense model of the same loss: log L(N, E) = log L(N_eff, 1) solved for N_eff."""
        gained = math.log10(self.saturation(experts) / self.saturation.start)
        slope = self.by_parameters(1.0)
        return 10 ** ((self.by_parameters(experts) * math.log10(parameters) + self.b * gained) / slope)

    @property
    def cutoff(self) -> float:
        """N from which more experts lower the loss no further: 10^(-b/c)."""
        return 10 ** (-self.b / self.c)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """L = (constant / x)^exponent where ``of`` is all that limits the loss (2001.08361 eqs. 1.1 and 1.2).

    N counts parameters without embeddings.
    """

    of: Literal["parameters", "tokens"]
    constant: float
    exponent: float

    def loss(self, x: float) -> float:
        return (self.constant / x) ** self.exponent


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Kaplan:
    """L(N, D) = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D (2001.08361 eq. 1.5 and table 2).

    N counts parameters without embeddings.
    """

    alpha_n: float
    alpha_d: float
    n_c: float
    d_c: float

    def loss(self, parameters: float, tokens: float) -> float:
        limited = (self.n_c / parameters) ** (self.alpha_n / self.alpha_d)
        return (limited + self.d_c / tokens) ** self.alpha_d


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Chinchilla:
    """L(N, D) = e + a/N^alpha + b/D^beta (2203.15556 eq. 10). N counts every parameter."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        return self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def optimum(self, compute: float) -> tuple[float, float]:
        """N and D of least loss among those of ``compute`` = 6 N D operations (2203.15556 eq. 4)."""
        balance = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        parameters = balance * (compute / 6) ** (self.beta / (self.alpha + self.beta))
        return parameters, compute / 6 / parameters


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Krajewski:
    """L(N, D, G) = c + (g/G^gamma + a)/N^alpha + b/D^beta (2402.07871), for E = 64.

    N counts all parameters without embeddings, idle experts included. ``dense`` is the paper's fit of dense
    models to the same text.
    """

    a: float
    alpha: float
    b: float
    beta: float
    c: float
    g: float
    gamma: float
    dense: Chinchilla

    def loss(self, parameters: float, tokens: float, granularity: float) -> float:
        size = (self.g / granularity**self.gamma + self.a) / parameters**self.alpha
        return self.c + size + self.b / tokens**self.beta


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Abnar:
    """L = a/N^alpha + b/D^beta + c/(1-S)^lambda + d/((1-S)^delta N^gamma) + e (2501.12370).

    N counts all parameters, idle experts included; S is the share of experts that are idle.
    """

    a: float
    alpha: float
    b: float
    beta: float
    c: float
    lam: float
    d: float
    delta: float
    gamma: float
    e: float

    def loss(self, parameters: float, tokens: float, sparsity: float = 0.0) -> float:
        used = 1 - sparsity
        alone = self.a / parameters**self.alpha + self.b / tokens**self.beta + self.c / used**self.lam
        return alone + self.d / (used**self.delta * parameters**self.gamma) + self.e

    def sparsity_costs(self, parameters: float, sparsity: float) -> bool:
        """Whether more idle experts raise the loss at this total size: the sign of d L / d S."""
        used = 1 - sparsity
        own = self.lam * self.c / used**self.lam
        return own + self.delta * self.d / (used**self.delta * parameters**self.gamma) > 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """L = a Ehat^delta N^(alpha + gamma ln Ehat) + b Ehat^omega D^(beta + zeta ln Ehat) + c (2502.05172).

    N counts the parameters that a token uses, embeddings included; one expert is active (k = 1).
    """

    a: float
    alpha: float
    delta: float
    gamma: float
    b: float
    beta: float
    omega: float
    zeta: float
    c: float
    saturation: Saturation

    def loss(self, parameters: float, tokens: float, experts: float = 1.0) -> float:
        routed = self.saturation(experts)
        size = self.a * routed**self.delta * parameters ** (self.alpha + self.gamma * math.log(routed))
        data = self.b * routed**self.omega * tokens ** (self.beta + self.zeta * math.log(routed))
        return size + data + self.c


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Leverage:
    """Compute of a dense model over that of the MoE of the same loss (2507.17702).

    Ahat^(a + d log C + gamma x^2 + beta x) with x = log2 G, C the training operations of the MoE, and Ahat
    the share A of experts in use, saturated like the experts of ``Saturation`` but counted from 0. The paper
    prints no bases of logarithms; 10 for C and 2 for G give its examples.
    """

    a: float
    d: float
    gamma: float
    beta: float
    start: float
    most: float

    def ratio(self, active: float, granularity: float, compute: float) -> float:
        used = 1 / (1 / (active + 1 / (1 / self.start - 1 / self.most)) + 1 / self.most)
        x = math.log2(granularity)
        return used ** (self.a + self.d * math.log10(compute) + self.gamma * x**2 + self.beta * x)

    @property
    def best_granularity(self) -> float:
        """G of the greatest leverage, the same for every A and C."""
        return 2 ** (-self.beta / (2 * self.gamma))


Formula = Clark | Power | Kaplan | Chinchilla | Krajewski | Abnar | Joint | Leverage
