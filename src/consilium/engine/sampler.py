"""From logits to a token, one row at a time with the row's own generator, which no neighbour moves.

Legend: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from consilium.engine.request import Sampling, Top
from consilium.errors import ConsiliumError


def sample(
    logits_V: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
    seen: Sequence[int] = (),
    prompt: int = 0,
) -> tuple[int, float]:
    """Return the token and its log-probability under the unfiltered distribution. float32 throughout.

    A logit of -inf is never drawn. ``seen`` are the tokens that penalties count, the first ``prompt`` of them
    those that were given. Equal logits rank by index. Raises ConsiliumError where the model gave no number.
    """
    logits_V = logits_V.float()
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    biased_V = _biased(logits_V, sampling.logit_bias)
    penalised_V = _penalised(biased_V, sampling.repetition_penalty, seen)
    if sampling.presence_penalty or sampling.frequency_penalty:
        penalised_V = penalised_V - _answered(penalised_V, sampling, seen[prompt:])
    if sampling.temperature == 0:
        token = int(penalised_V.argmax())
    else:
        # Below the highest logit and by no less than the smallest normal number: no quotient is inf or NaN.
        temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
        scaled_V = (penalised_V - penalised_V.max()) / temperature
        ranked_V, order_V = torch.sort(scaled_V, descending=True, stable=True)
        _check(ranked_V[0])
        probs_V = torch.softmax(ranked_V, dim=-1) * _kept(ranked_V, sampling)
        token = int(order_V[torch.multinomial(probs_V, 1, generator=generator)])
    _check(logprobs_V[token])
    return token, float(logprobs_V[token])


def likeliest(logprobs_V: Tensor, count: int) -> Top:
    """The ``count`` tokens that are likeliest, with the very values of ``logprobs_V``."""
    found = logprobs_V.topk(min(count, len(logprobs_V)))
    return tuple(zip(found.indices.tolist(), found.values.tolist(), strict=True))


def _biased(logits_V: Tensor, bias: Sequence[tuple[int, float]]) -> Tensor:
    if not bias:
        return logits_V
    tokens, values = zip(*bias, strict=True)
    index = torch.tensor(tokens, device=logits_V.device)
    return logits_V.index_add(0, index, torch.tensor(values, device=logits_V.device))


def _answered(logits_V: Tensor, sampling: Sampling, answer: Sequence[int]) -> Tensor:
    """What the tokens of the answer so far lose [V]."""
    index = torch.tensor(answer, dtype=torch.int64, device=logits_V.device)
    counts_V = torch.bincount(index, minlength=len(logits_V)).to(logits_V.dtype)
    return sampling.presence_penalty * (counts_V > 0) + sampling.frequency_penalty * counts_V


def _penalised(logits_V: Tensor, penalty: float, seen: Sequence[int]) -> Tensor:
    if penalty == 1 or not seen:
        return logits_V
    index = torch.tensor(sorted(set(seen)), device=logits_V.device)
    some = logits_V[index]
    return logits_V.index_copy(0, index, torch.where(some > 0, some / penalty, some * penalty))


def _kept(ranked_V: Tensor, sampling: Sampling) -> Tensor:
    """Bool over ranks: inside the top k, then the smallest set whose probability reaches p, then above min-p.

    Never empty.
    """
    ranks_V = torch.arange(ranked_V.shape[0], device=ranked_V.device)
    kept_V = ranks_V < (sampling.top_k or ranked_V.shape[0])
    if sampling.top_p < 1:
        # A sum of 100,000 float32 probabilities reaches 1 before its end.
        probs_V = torch.softmax(ranked_V.masked_fill(~kept_V, -torch.inf).double(), dim=-1)
        kept_V &= probs_V.cumsum(0) - probs_V < sampling.top_p
    if sampling.min_p > 0:
        kept_V &= ranked_V - ranked_V[0] >= math.log(sampling.min_p)
    return kept_V | (ranks_V == 0)


def _check(number: Tensor) -> None:
    if not number.isfinite():
        raise ConsiliumError(
            "the model's logits are not finite, so its arithmetic overflowed or its weights are damaged;"
            " load it in float32 or bfloat16, and check the folder with consilium doctor."
        )
