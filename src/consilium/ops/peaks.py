"""The largest logit of each attention head, computed where it may be large.

Legend: B rows, S tokens a row, H heads, K width of a key.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from consilium.ops.documents import Documents

STRIPE: Final = 256
"""Queries whose logits of one head are held at once."""


@torch.no_grad()
def largest_logits(
    q_BSHK: Tensor,
    k_BSHK: Tensor,
    documents: Documents | None,
    valid_BS: Tensor | None,
    *,
    scale: float,
    above: float,
) -> Tensor:
    """Float32 [H]: the largest scale * q k of every pair of valid tokens that causal attention sees.

    Exact where it is above ``above``. No logit exceeds scale * max |q| * max |k|: where that bound is not
    above, it is returned instead, so that heads that are well cost two norms a token and no product.
    """
    q_BSHK, k_BSHK = q_BSHK.detach().float(), k_BSHK.detach().float()
    norms_H = [_largest_norm(x_BSHK, valid_BS) for x_BSHK in (q_BSHK, k_BSHK)]
    largest_H = scale * norms_H[0] * norms_H[1]
    for head in (largest_H > above).nonzero().flatten().tolist():
        largest_H[head] = scale * _largest(q_BSHK[:, :, head], k_BSHK[:, :, head], documents, valid_BS)
    return largest_H


def _largest_norm(x_BSHK: Tensor, valid_BS: Tensor | None) -> Tensor:
    norm_BSH = x_BSHK.norm(dim=-1)
    if valid_BS is not None:
        norm_BSH = norm_BSH * valid_BS[:, :, None]
    return norm_BSH.flatten(0, 1).amax(0)


def _largest(q_BSK: Tensor, k_BSK: Tensor, documents: Documents | None, valid_BS: Tensor | None) -> Tensor:
    place_S = torch.arange(q_BSK.shape[1], device=q_BSK.device)
    largest = q_BSK.new_full((), -torch.inf)
    for query_s in place_S.split(STRIPE):
        first, last = int(query_s[0]), int(query_s[-1]) + 1
        seen_BsS = (place_S[:last] <= query_s[:, None]).expand(q_BSK.shape[0], -1, -1)
        if documents is not None:
            number_BS = documents.number_BS[:, :last]
            seen_BsS = seen_BsS & (number_BS[:, first:, None] == number_BS[:, None, :])
        if valid_BS is not None:
            valid_bS = valid_BS[:, :last]
            seen_BsS = seen_BsS & valid_bS[:, first:, None] & valid_bS[:, None, :]
        logits_BsS = q_BSK[:, first:last] @ k_BSK[:, :last].mT
        largest = torch.maximum(largest, logits_BsS.masked_fill(~seen_BsS, -torch.inf).amax())
    return largest
