"""Bits per byte of held-out text, by domain: comparable between tokenizers, unlike loss per token.

Legend: B rows, S tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from consilium.data.corpus import Corpus
from consilium.data.loader import held_out_batches
from consilium.model.decoder import Decoder
from consilium.model.types import Inputs, Losses, Objective, Options


@dataclass(frozen=True, slots=True)
class Evaluation:
    """``bits_per_byte`` is the plain mean over domains, so that an easy domain cannot carry the figure."""

    bits_per_byte: float
    domains: Mapping[str, float]
    tokens: int


@torch.no_grad()
def evaluate(
    model: Decoder,
    corpus: Corpus,
    *,
    sequence_length: int,
    batch: int = 8,
    limit_tokens: int | None = None,
    options: Options = Options(),
) -> Evaluation:
    """Run the model over each domain's held-out text, at most ``limit_tokens`` a domain. No state changes."""
    domains: dict[str, float] = {}
    tokens = 0
    for domain in corpus.domains:
        nats, size = 0.0, 0
        for labelled in held_out_batches(corpus, domain, sequence_length, batch, limit_tokens=limit_tokens):
            objective = Objective(labelled.batch.targets_BS, ahead=False)
            losses: Losses = model(Inputs.of(labelled.batch), options=options, objective=objective)
            nats += float(losses.nll)
            tokens += int(losses.targets)
            size += int(labelled.bytes_BS.sum())
        if size:
            domains[domain] = nats / math.log(2) / size
    return Evaluation(sum(domains.values()) / max(len(domains), 1), domains, tokens)
