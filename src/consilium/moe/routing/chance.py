"""The smooth chance of each expert to be chosen, through which the load loss reaches the gates.

Legend: T tokens, N outputs of a gate, G groups of M experts, E = G M experts, K choices a token.

A count of tokens has no gradient. Shazeer 2017 (1701.06538 appendix A) replaces "is in the top k" by the
chance of that on a fresh draw of the expert's own noise, the noise of the others held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilium.moe.routing.gate import Level


def chance(level: Level, k: int) -> Tensor:
    """The chance [T, N] of each output to be among the k highest (Shazeer 2017 equations 8 and 9).

    Its clean logit against the k-th highest of the other outputs' noisy ones, which is the (k + 1)-th of all
    for those inside the top k. Where k is every output, all are certain.
    """
    assert level.deviation_TN is not None, "a chance needs learned noise"
    if k >= level.clean_TN.shape[1]:
        return torch.ones_like(level.clean_TN)
    top = level.noisy_TN.topk(k + 1, dim=1).values
    inside_T1, outside_T1 = top[:, k, None], top[:, k - 1, None]
    threshold_TN = torch.where(level.noisy_TN > inside_T1, inside_T1, outside_T1)
    return torch.special.ndtr((level.clean_TN - threshold_TN) / level.deviation_TN)


def joint_chance(
    primary: Level, secondary: Level, keep: int, k: int, used_TG: Tensor, valid_T: Tensor
) -> Tensor:
    """What each token adds [T, E] to the load of a hierarchical mixture (Shazeer 2017 appendix B).

    Load_H(i, j) = Load_primary(i) * Load_i(j) / |X_i|, where X_i are the tokens that use group i and Load_i
    counts them alone: the sum over tokens of this value is Load_H.
    """
    load_G = chance(primary, keep).masked_fill(~valid_T[:, None], 0).sum(dim=0)
    share_G = load_G / used_TG.sum(dim=0).clamp_min(1)
    within_TGM = _within_groups(secondary, k, used_TG.shape[1])
    return (within_TGM * (used_TG * share_G)[:, :, None]).flatten(1)


def _within_groups(secondary: Level, k: int, groups: int) -> Tensor:
    """The chance [T, G, M] of each expert to be among the k highest of its own group."""
    assert secondary.deviation_TN is not None, "a chance needs learned noise"
    tokens, experts = secondary.clean_TN.shape
    shape = tokens, groups, experts // groups
    parts = (secondary.clean_TN, secondary.noisy_TN, secondary.deviation_TN)
    clean_XM, noisy_XM, deviation_XM = (part.reshape(tokens * groups, shape[2]) for part in parts)
    return chance(Level(clean_XM, noisy_XM, deviation_XM), k).view(shape)
