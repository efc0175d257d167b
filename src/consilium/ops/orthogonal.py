"""Matrices with their singular values near 1, by Newton-Schulz alone.

Legend: P matrices, M rows, N columns of one.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
"""Of the quintic a s + b s^3 + c s^5, which takes every s of (0, 1] to about 0.7 .. 1.2 in five turns (Jordan
2024, kellerjordan.github.io/posts/muon)."""
SMALLEST: Final = 1e-7
"""A matrix of a smaller norm stays small: the momentum of an expert that was never chosen stays 0."""
TOGETHER: Final = 2**23
"""Values that are computed at once: scratch memory is a few times as much, whatever the stack."""


def orthogonalised(
    stack_PMN: Tensor, *, iterations: int = 5, products: torch.dtype = torch.float32
) -> Tensor:
    """Return U V^T of each matrix U S V^T about: float32 [P, M, N], computed in ``products``.

    The quintic of ``COEFFICIENTS`` is applied to the singular values through products with the smaller Gram
    matrix, so that no decomposition is needed. A matrix of zeros stays one.
    """
    size = max(1, TOGETHER // max(1, stack_PMN.shape[1:].numel()))
    out_PMN = torch.empty_like(stack_PMN, dtype=torch.float32)
    for part_PMN, result_PMN in zip(stack_PMN.split(size), out_PMN.split(size), strict=True):
        tall = part_PMN.shape[-2] > part_PMN.shape[-1]
        wide_PMN = part_PMN.mT if tall else part_PMN
        turned_PMN = _newton_schulz(wide_PMN.float(), iterations, products)
        result_PMN.copy_(turned_PMN.mT if tall else turned_PMN)
    return out_PMN


def _newton_schulz(wide_PMN: Tensor, iterations: int, products: torch.dtype) -> Tensor:
    a, b, c = COEFFICIENTS
    norm_P11 = wide_PMN.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST)
    x_PMN = (wide_PMN / norm_P11).to(products)
    for _ in range(iterations):
        gram_PMM = x_PMN @ x_PMN.mT
        change_PMM = torch.baddbmm(gram_PMM, gram_PMM, gram_PMM, beta=b, alpha=c)
        x_PMN = torch.baddbmm(x_PMN, change_PMM, x_PMN, beta=a)
    return x_PMN
