"""How evenly experts are used. Sum counts first, then take ratios: a mean of ratios is neither.

Legend: E experts, S steps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def max_over_mean(load_E: Tensor) -> Tensor:
    """Load of the busiest expert over its fair share, over the last axis: float64, 1.0 is perfect balance.

    NaN where nothing was routed.
    """
    load = load_E.double()
    return load.amax(-1) / load.mean(-1)


def max_violation(load_E: Tensor) -> Tensor:
    """MaxVio = max / mean - 1 over the last axis (Loss-free balancing, 2408.15664 section 4.1)."""
    return max_over_mean(load_E) - 1


def dead_experts(load_SE: Tensor) -> Tensor:
    """Return bool [E]: experts that got no token in any of the S steps."""
    return (load_SE == 0).all(-2)


def load_entropy(load_E: Tensor) -> Tensor:
    """Entropy of the load over the last axis, over ln E: 1 is even, 0 one expert alone, NaN without load."""
    load = load_E.double()
    share = load / load.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1) / torch.tensor(load.shape[-1], dtype=torch.float64).log()
