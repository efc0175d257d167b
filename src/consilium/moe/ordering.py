"""Deterministic order: the highest values of a row and places inside groups, ties to the lowest index.

Legend: N rows or copies, M columns, k columns kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def highest(values_NM: Tensor, k: int) -> Tensor:
    """Columns [N, k] of the k highest values of each row in falling order, int64.

    Equal values go to the lower column, on every device and for every k; NaN counts as the highest. ``topk``
    leaves ties open but is several times faster than a stable sort, so its answer is taken where its k + 1
    values strictly fall: then no other answer exists. To look at that would stop the host where the values
    are on another device.
    """
    columns = values_NM.shape[1]
    if k == 0:
        return torch.empty(values_NM.shape[0], 0, dtype=torch.int64, device=values_NM.device)
    if values_NM.device.type == "cpu":
        top, index = values_NM.topk(min(k + 1, columns), dim=1)
        if bool((top[:, :-1] > top[:, 1:]).all()):
            return index[:, :k]
    return values_NM.sort(dim=1, descending=True, stable=True).indices[:, :k]


def place_within(group_N: Tensor) -> Tensor:
    """How many earlier entries belong to the same group as each entry: int64 [N]."""
    order_N = group_N.argsort(stable=True)
    sorted_N = group_N[order_N]
    start_N = torch.searchsorted(sorted_N, sorted_N)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(group_N.shape[0], device=group_N.device) - start_N
    return place_N


def capacity(factor: float, tokens: int, k: int, experts: int) -> int:
    """ceil(factor * tokens * k / experts), not one more where the product is whole but its float is not."""
    return math.ceil(factor * tokens * k / experts * (1 - 1e-12))


def capacities(factor: float, tokens_G: Tensor, k: int, experts: int) -> Tensor:
    """The same for counts on a device, int64."""
    return (tokens_G.double() * factor * k / experts * (1 - 1e-12)).ceil().long()
