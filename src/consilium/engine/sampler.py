"""From logits to a token, one row at a time with the row's own generator, which no neighbour moves.

Legend: V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilium.engine.request import Sampling


def sample(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[int, float]:
    """Return the token and its log-probability under the unfiltered distribution. float32 throughout.

    Filters apply in the order temperature, top-k, top-p; equal logits rank by index.
    """
    logits_V = logits_V.float()
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    if sampling.temperature == 0:
        token = int(logits_V.argmax())
        return token, float(logprobs_V[token])
    # Below the highest logit and by no less than the smallest normal number: no quotient is inf or NaN.
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    scaled_V = (logits_V - logits_V.max()) / temperature
    ranked_V, order_V = torch.sort(scaled_V, descending=True, stable=True)
    probs_V = torch.softmax(ranked_V, dim=-1) * _kept(ranked_V, sampling)
    token = int(order_V[torch.multinomial(probs_V, 1, generator=generator)])
    return token, float(logprobs_V[token])


def _kept(ranked_V: Tensor, sampling: Sampling) -> Tensor:
    """Bool over ranks: inside the top k, and the smallest set whose probability reaches p (never empty)."""
    ranks_V = torch.arange(ranked_V.shape[0], device=ranked_V.device)
    within_k_V = ranks_V < (sampling.top_k or ranked_V.shape[0])
    probs_V = torch.softmax(ranked_V.masked_fill(~within_k_V, -torch.inf), dim=-1)
    before_V = probs_V.cumsum(0) - probs_V
    return within_k_V & ((before_V < sampling.top_p) | (ranks_V == 0))
