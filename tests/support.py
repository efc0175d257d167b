"""Helpers that tests of several packages share."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected| by the Euclidean norm of the whole tensor, in float64.

    Zero against zero is 0, anything against zero is infinite: no absolute tolerance hides a tiny tensor.
    """
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    wanted = expected.detach().to(torch.float64)
    error = float((actual.detach().to(torch.float64) - wanted).norm())
    size = float(wanted.norm())
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return error / size
