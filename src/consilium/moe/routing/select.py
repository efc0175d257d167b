"""Which experts a token uses: every selector of ``consilium.config.router`` over a matrix of values.

Legend: T tokens, E experts, K most experts a token may use, G groups of N experts, C tokens an expert takes.

Selection values are scores with the balance bias. Experts that may not be chosen have -inf: never a finite
value, which a legal negative bias could undercut. Ties go to the lowest expert. NaN is the highest value and
stays chosen, so that it reaches the output and the training guard instead of vanishing here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from consilium.config.router import (
    ExpertChoice,
    Groups,
    Hash,
    SampledSecond,
    Select,
    Sinkhorn,
    Threshold,
    TopK,
    TopP,
    TwoLevel,
    most_active,
)
from consilium.moe.ordering import capacities, capacity, highest
from consilium.moe.types import CONSIDERED, WANTED, LayerMode, Replay, Tokens
from consilium.ops.counting import scramble

_SMALLEST: Final = 1e-250
"""In place of a sum of nothing, whose inverse times a number of tokens is still a float64."""


@dataclass(frozen=True, slots=True)
class Choice:
    experts_TK: Tensor
    """int64, in falling order of preference."""
    considered_TK: Tensor
    """bool: choices over which weights are normalised."""
    wanted_TK: Tensor
    """bool: choices that are used; inside those considered."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a selector may look at, without gradient."""

    values_TE: Tensor
    """Scores with the balance bias; -inf where an expert may not be chosen."""
    scores_TE: Tensor
    logits_TE: Tensor
    """What scores were made of."""
    primary_TG: Tensor | None = None
    """Logits of the groups, where a gate of their own chooses among them."""
    table_VK: Tensor | None = None
    """The experts of every token id, where routing is by hash."""


def choose(select: Select, evidence: Evidence, tokens: Tokens, mode: LayerMode) -> Choice:
    """Apply the selector or the replay in ``mode.override``, then budgets, muting and padding.

    Raises ConsiliumError for an override that does not fit the tokens.
    """
    override = mode.override
    override.check(tokens.count)
    values_TE = evidence.values_TE
    if override.mute_TE is not None:
        values_TE = values_TE.masked_fill(override.mute_TE, -torch.inf)
        evidence = replace(evidence, values_TE=values_TE)
    if override.replay is None:
        choice = _selected(select, evidence, tokens, mode)
    else:
        choice = _replayed(override.replay)
    allowed_TK = tokens.valid_T[:, None] & (values_TE.gather(1, choice.experts_TK) != -torch.inf)
    considered_TK = choice.considered_TK & allowed_TK
    if override.k_T is not None:
        considered_TK = considered_TK & (considered_TK.cumsum(dim=1) <= override.k_T[:, None])
    return Choice(choice.experts_TK, considered_TK, choice.wanted_TK & considered_TK)


def _replayed(replay: Replay) -> Choice:
    """Weights were normalised over more than was used where a draw or admission dropped copies afterwards."""
    return Choice(replay.experts_TK, replay.reached_TK >= CONSIDERED, replay.reached_TK >= WANTED)


def _selected(select: Select, evidence: Evidence, tokens: Tokens, mode: LayerMode) -> Choice:
    values_TE, scores_TE = evidence.values_TE, evidence.scores_TE
    experts = values_TE.shape[1]
    k = min(most_active(select) or experts, experts)
    match select:
        case TopK(groups=groups):
            return _open(values_TE if groups is None else _in_best_groups(values_TE, groups), k)
        case Sinkhorn(iterations=iterations):
            if mode.training:
                values_TE = _planned(evidence, tokens.valid_T, iterations)
            return _open(values_TE, k)
        case TwoLevel():
            assert evidence.primary_TG is not None, "two levels need a gate of groups"
            return _open(_two_level(values_TE, evidence.primary_TG, select), k)
        case SampledSecond():
            return _sampled_second(highest(values_TE, k), scores_TE, mode)
        case Threshold(minimum=minimum):
            experts_TK = highest(values_TE, k)
            return _used(experts_TK, ~(values_TE.gather(1, experts_TK) <= minimum))
        case TopP(p=p):
            return _top_p(highest(values_TE, k), scores_TE, p)
        case ExpertChoice(factor=factor):
            return _chosen_by_experts(values_TE, tokens.valid_T, factor)
        case Hash():
            assert evidence.table_VK is not None, "hash routing needs its table"
            return _all(evidence.table_VK[tokens.ids_T])


def _all(experts_TK: Tensor) -> Choice:
    return _used(experts_TK, torch.ones_like(experts_TK, dtype=torch.bool))


def _used(experts_TK: Tensor, wanted_TK: Tensor) -> Choice:
    return Choice(experts_TK, wanted_TK, wanted_TK)


def _open(values_TE: Tensor, k: int) -> Choice:
    """The k highest; where muting leaves fewer open, what is closed only fills the row."""
    experts_TK = highest(values_TE, k)
    return _used(experts_TK, values_TE.gather(1, experts_TK) != -torch.inf)


def _in_best_groups(values_TE: Tensor, groups: Groups) -> Tensor:
    """Values with -inf outside the best groups (DeepSeek-V2 section 2.2.2, V3 section 2.1.2)."""
    values_TGN = values_TE.unflatten(1, (groups.count, -1))
    match groups.score:
        case "max":
            best_TG = values_TGN.amax(dim=2)
        case "top2_sum":
            best_TG = _best_two(values_TGN)
    return values_TGN.masked_fill(_outside(best_TG, groups.keep)[:, :, None], -torch.inf).flatten(1)


def _best_two(values_TGN: Tensor) -> Tensor:
    """The sum of the two highest values of each group.

    Where muting leaves a group of a token one open expert, sums do not compare: the token's groups then count
    by their best, so that none goes before the one with the best expert left.
    """
    first_TG, second_TG = values_TGN.topk(2, dim=2).values.unbind(dim=2)
    alone_TG = (second_TG == -torch.inf) & (first_TG != -torch.inf)
    return torch.where(alone_TG.any(dim=1, keepdim=True), first_TG, first_TG + second_TG)


def _outside(values_TX: Tensor, k: int) -> Tensor:
    """Whether, bool [T, X], a value is outside the k highest of its row."""
    return torch.ones_like(values_TX, dtype=torch.bool).scatter(1, highest(values_TX, k), value=False)


def _planned(evidence: Evidence, valid_T: Tensor, iterations: int) -> Tensor:
    """Logarithms, float64, of the plan that Sinkhorn's iterations make of exp(logits).

    Without the factors of tokens, which leave the order of a token's experts alone. Padding sends nothing,
    and to an expert that is closed to all nothing is sent.
    """
    closed_TE = evidence.values_TE == -torch.inf
    logits_TE = evidence.logits_TE.double().masked_fill(closed_TE, -torch.inf)
    most_T1 = logits_TE.amax(dim=1, keepdim=True)
    plan_TE = (logits_TE - most_T1.masked_fill(most_T1 == -torch.inf, 0)).exp()
    plan_TE = plan_TE.masked_fill(~valid_T[:, None], 0)
    share = valid_T.sum().clamp_min(1) / plan_TE.shape[1]
    factor_E = plan_TE.new_ones(plan_TE.shape[1])
    for _ in range(iterations):
        sent_T = (plan_TE @ factor_E).clamp_min(_SMALLEST)
        factor_E = share / (plan_TE.T @ (1 / sent_T)).clamp_min(_SMALLEST)
    return logits_TE + factor_E.log()


def _two_level(values_TE: Tensor, primary_TG: Tensor, select: TwoLevel) -> Tensor:
    """Values with -inf outside the best k of the best groups (Shazeer 2017, 1701.06538 appendix B).

    The primary gate alone compares groups, of which those without an open expert drop out.
    """
    values_TGN = values_TE.unflatten(1, (select.groups, -1))
    primary_TG = primary_TG.masked_fill((values_TGN == -torch.inf).all(dim=2), -torch.inf)
    closed_TG = _outside(primary_TG, select.keep)
    closed_XN = _outside(values_TGN.flatten(0, 1), select.k)
    return values_TGN.masked_fill(closed_TG[:, :, None] | closed_XN.view_as(values_TGN), -torch.inf).flatten(
        1
    )


def used_groups(choice: Choice, groups: int, experts: int) -> Tensor:
    """Groups, as bool [T, G], of which a token uses an expert."""
    group_TK = choice.experts_TK // (experts // groups)
    used_TG = torch.zeros(group_TK.shape[0], groups, dtype=torch.int64, device=group_TK.device)
    return used_TG.scatter_add(1, group_TK, choice.wanted_TK.long()) > 0


def _sampled_second(experts_TK: Tensor, scores_TE: Tensor, mode: LayerMode) -> Choice:
    """GShard algorithm 1: gates sum to one over both; the second is used with probability min(1, 2 g2)."""
    considered_TK = torch.ones_like(experts_TK, dtype=torch.bool)
    if not mode.training or experts_TK.shape[1] < 2:
        return _used(experts_TK, considered_TK)
    gates_TK = scores_TE.gather(1, experts_TK).detach()
    random_T = torch.rand(experts_TK.shape[0], generator=mode.generator, device=gates_TK.device)
    second_T = random_T * gates_TK.sum(dim=1) < 2 * gates_TK[:, 1]
    return Choice(experts_TK, considered_TK, torch.stack([considered_TK[:, 0], second_T], dim=1))


def _top_p(experts_TK: Tensor, scores_TE: Tensor, p: float) -> Choice:
    """An expert is used while the experts before it have not reached p (2403.07652 equation 4)."""
    scores_TK = scores_TE.gather(1, experts_TK)
    before_TK = torch.zeros_like(scores_TK)
    before_TK[:, 1:] = scores_TK[:, :-1].cumsum(dim=1)
    return _used(experts_TK, ~(before_TK >= p))


def _chosen_by_experts(values_TE: Tensor, valid_T: Tensor, factor: float) -> Choice:
    """Each expert takes its best ceil(factor * T / E) valid tokens (2202.09368 section 3.2).

    Room is made for as many as if all were valid; what is beyond the limit of the valid ones is not taken.
    """
    tokens, experts = values_TE.shape
    values_TE = values_TE.masked_fill(~valid_T[:, None], -torch.inf)
    chosen_EC = highest(values_TE.T, min(tokens, capacity(factor, tokens, 1, experts)))
    limit = capacities(factor, valid_T.sum(), 1, experts)
    taken_EC = torch.arange(chosen_EC.shape[1], device=valid_T.device).expand_as(chosen_EC) < limit
    wanted_ET = torch.zeros_like(values_TE, dtype=torch.bool).T.scatter(1, chosen_EC, taken_EC)
    experts_TK = highest(values_TE, experts)
    return _used(experts_TK, wanted_ET.T.gather(1, experts_TK))


def hash_table(config: Hash, experts: int) -> Tensor:
    """Distinct experts, int64 [V, k], for every token id, drawn from the seed (2106.04426 section 3).

    By integer hashing, so that a seed means one table whatever draws random numbers elsewhere: the j-th of a
    token is the r-th of those it has not yet, r a hash of seed, token and j.
    """
    ids_V = torch.arange(config.vocab_size)
    state_V = scramble(scramble(torch.full_like(ids_V, config.seed)) + ids_V + 1)
    table_Vk = ids_V.new_empty(config.vocab_size, 0)
    for j in range(min(config.k, experts)):
        state_V = scramble(state_V + j + 1)
        pick_V = state_V.remainder(experts - j)
        for taken_V in table_Vk.sort(dim=1).values.unbind(dim=1):
            pick_V = pick_V + (pick_V >= taken_V)
        table_Vk = torch.cat((table_Vk, pick_V[:, None]), dim=1)
    return table_Vk


def drawn_table(config: Hash, experts: int) -> Tensor:
    """The table of weights that were trained before it was saved beside them, by torch's generator."""
    generator = torch.Generator().manual_seed(config.seed)
    draws_VE = torch.rand(config.vocab_size, experts, generator=generator, device="cpu")
    return highest(draws_VE, min(config.k, experts))
