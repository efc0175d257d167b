"""The hierarchical mixture of Shazeer 2017 appendix B with plain loops, gate by gate.

Legend: T tokens, G groups, M experts of a group, E = G M experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from consilium.config.router import Router, TwoLevel

State = dict[str, Tensor]


def gates(select: TwoLevel, state: State, row: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Logits of the groups, and of the experts of each group."""
    primary = list(state["router.primary.weight"] @ row)
    flat = list(state["router.projection.weight"] @ row)
    size = len(flat) // select.groups
    return primary, [flat[g * size : (g + 1) * size] for g in range(select.groups)]


def joint_logits(select: TwoLevel, state: State, row: Tensor) -> Tensor:
    """The logarithm of the probability of a group times that of an expert in it."""
    primary, secondary = gates(select, state, row)
    p = softmax(dict(enumerate(primary)))
    s = [softmax(dict(enumerate(part))) for part in secondary]
    return torch.stack([torch.log(p[g] * s[g][m]) for g in range(len(p)) for m in range(len(s[g]))])


def weights(config: Router, state: State, row: Tensor) -> dict[int, Tensor]:
    """Expert -> scaled product of a softmax over the kept groups and one over the kept of the group.

    In falling order of joint probability.
    """
    select = config.select
    assert isinstance(select, TwoLevel)
    primary, secondary = gates(select, state, row)
    joint = joint_logits(select, state, row).tolist()
    kept = best(primary, select.keep)
    p, found = softmax({g: primary[g] for g in kept}), {}
    size = len(secondary[0])
    for g in kept:
        s = softmax({m: secondary[g][m] for m in best(secondary[g], select.k)})
        found |= {g * size + m: p[g] * weight * config.scale for m, weight in s.items()}
    return {e: found[e] for e in sorted(found, key=lambda e: (-joint[e], e))}


def best(values: list[Tensor], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i].item(), i))[:k]


def softmax(logits: dict[int, Tensor]) -> dict[int, Tensor]:
    total = sum(torch.exp(z) for z in logits.values())
    return {i: torch.exp(z) / total for i, z in logits.items()}


def load(
    select: TwoLevel, primary: list[Tensor], secondary: list[Tensor], valid: list[bool]
) -> list[list[Tensor]]:
    """Load_H by group and expert. Each level is its clean logits, noisy logits and deviations."""
    tokens = [t for t, ok in enumerate(valid) if ok]
    size = secondary[0].shape[1] // select.groups
    out = []
    for g in range(select.groups):
        mine = [t for t in tokens if g in best(list(primary[1][t]), select.keep)]
        load_primary = sum(chance(*(part[t] for part in primary), g, select.keep) for t in tokens)
        here = slice(g * size, (g + 1) * size)
        within = [
            sum((chance(*(part[t, here] for part in secondary), m, select.k) for t in mine), torch.zeros(()))
            for m in range(size)
        ]
        out.append([load_primary * value / max(len(mine), 1) for value in within])
    return out


def chance(clean: Tensor, noisy: Tensor, deviation: Tensor, i: int, k: int) -> Tensor:
    """Equation 9: of the others' noisy logits, the k-th highest is what i has to beat."""
    others = sorted((noisy[j] for j in range(len(noisy)) if j != i), key=lambda z: -z.item())
    if k > len(others):
        return torch.ones((), dtype=clean.dtype)
    return 0.5 * (1 + torch.erf((clean[i] - others[k - 1]) / deviation[i] / math.sqrt(2)))
