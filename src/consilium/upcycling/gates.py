"""How a gate begins: rows in directions of the method's choice, levelled so that loads are even.

A gate of zeros would send every token to the experts of lowest index. Rows are made free of what all tokens
have in common, brought to one spread, and each is moved along the mean token until the experts that a text
chooses are chosen alike. Equal rows stay equal.

Legend: T tokens, D hidden size, E experts or groups of them, K chosen.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from consilium.ops.counting import occurrences

_ROUNDS: Final = 300
_TINY: Final = 1e-12
_ALIKE: Final = 1e-4
"""Distance of logits over their size, below which nothing but rounding is between them."""


def random_rows(experts: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(experts, size, generator=generator)


def vague(rows_ED: Tensor, x_TD: Tensor) -> Tensor:
    """Directions that say nothing about the text, or what an earlier one says: bool [E].

    A gate of such rows ties for every token, and the lowest index wins.
    """
    apart_TD = x_TD - x_TD.mean(0)
    logits_TE = (apart_TD @ rows_ED.T).double()
    size_E = logits_TE.norm(dim=0)
    unit_TE = logits_TE / size_E.clamp(min=_TINY)
    alike_EE = 2 - 2 * unit_TE.T @ unit_TE < _ALIKE**2
    return (size_E < _ALIKE * apart_TD.norm()) | alike_EE.tril(-1).any(1)


def levelled(rows_ED: Tensor, x_TD: Tensor, k: int, spread: float) -> Tensor:
    """Gate rows [E, D] whose logits on ``x_TD`` have mean about 0, this standard deviation and even loads."""
    mean_D = x_TD.mean(0)
    along_D = mean_D / mean_D.square().sum().clamp(min=_TINY)
    rows_ED = rows_ED - (rows_ED @ along_D)[:, None] * mean_D
    deviation_E = (x_TD @ rows_ED.T).std(0).clamp(min=_TINY)
    rows_ED = rows_ED / deviation_E[:, None]
    shift_E = _shifts(x_TD @ rows_ED.T, x_TD @ along_D, k)
    return (rows_ED + shift_E[:, None] * along_D) * spread


def _shifts(logits_TE: Tensor, along_T: Tensor, k: int) -> Tensor:
    """How far each row moves along the mean token, whose product with a token is about 1."""
    experts = logits_TE.shape[1]
    mean = logits_TE.shape[0] * k / experts
    shift_E, best_E = torch.zeros(experts), torch.zeros(experts)
    least = float("inf")
    for step in range(_ROUNDS):
        chosen_TK = (logits_TE + along_T[:, None] * shift_E).topk(k, dim=1).indices
        excess_E = occurrences(chosen_TK, experts).float() / mean - 1
        if float(excess_E.max()) < least:
            least, best_E = float(excess_E.max()), shift_E.clone()
        shift_E = shift_E - 0.3 / (1 + step / 30) * excess_E.clamp(-1, 1)
        shift_E = shift_E - shift_E.mean()
    return best_E
