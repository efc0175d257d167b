"""Bits per byte of held-out text, by domain: comparable between tokenizers, unlike loss per token.

Legend: B rows, S tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from consilium.data.corpus import Corpus
from consilium.data.loader import LabelledBatch, held_out_batches, held_out_tokens
from consilium.errors import ConsiliumError
from consilium.evaluation.loads import ExpertLoad, LoadCounter
from consilium.model.decoder import Decoder
from consilium.model.types import Inputs, Losses, Objective, Options
from consilium.parallel.mesh import ALONE, Mesh

MOST_TOKENS = 4096
"""Tokens of one pass, beyond a single window."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """``bits_per_byte`` is the plain mean over domains, so that an easy domain cannot carry the figure.

    Figures of two models compare where text, context and stride are the same and both are causal.
    """

    bits_per_byte: float
    domains: Mapping[str, float]
    tokens: int
    bytes: int = 0
    """Bytes of the source text that was predicted."""
    documents: int = 0
    """Documents that it was taken from."""
    context: int = 0
    """Most tokens that a prediction sees."""
    stride: int = 0
    """Tokens from the start of one window to that of the next."""
    causal: bool = True
    """Whether no prediction saw later tokens; otherwise the figure is none of prediction."""
    loads: Mapping[int, ExpertLoad] = field(default_factory=dict)
    """By layer."""
    nats_per_token: Mapping[str, float] = field(default_factory=dict)
    """Loss by domain, which is that of one tokenizer."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How text is cut into windows."""

    context: int
    stride: int | None = None
    """Tokens from the start of one window to that of the next; by default they do not overlap."""
    limit_tokens: int | None = None
    """Of a domain."""
    batch: int = 8

    @property
    def rows(self) -> int:
        return max(1, min(self.batch, MOST_TOKENS // self.context))

    def batches(self, corpus: Corpus, domain: str) -> Iterator[LabelledBatch]:
        return held_out_batches(
            corpus, domain, self.context, self.rows, stride=self.stride, limit_tokens=self.limit_tokens
        )


def _dealt(batches: Iterator[LabelledBatch], mesh: Mesh) -> Iterator[tuple[LabelledBatch, bool]]:
    """This process's batch of each round, and whether it counts.

    Experts may live elsewhere, so nobody sits out: who has none left runs another's, which does not count.
    """
    world = mesh.world
    while round_ := list(itertools.islice(batches, world.size)):
        counts = world.rank < len(round_)
        yield round_[world.rank if counts else 0], counts


@torch.no_grad()
def measure(
    model: Decoder,
    corpus: Corpus,
    reading: Reading,
    *,
    options: Options = Options(),
    progress: Callable[[float, float], None] | None = None,
    mesh: Mesh = ALONE,
) -> Evaluation:
    """Run the model over each domain's held-out text. No state changes.

    The processes of ``mesh`` deal the windows among them. Raises ConsiliumError where nothing is to be
    predicted.
    """
    moe = model.config.moe
    whole = sum(held_out_tokens(text, reading.limit_tokens) for text in corpus.held_out.values())
    domains: dict[str, float] = {}
    nats_per_token: dict[str, float] = {}
    loads, tokens, size = LoadCounter(), 0, 0
    device = next(model.parameters()).device
    for domain in corpus.domains:
        nats, seen, domain_size, before = 0.0, 0, 0, tokens
        for labelled, counts in _dealt(reading.batches(corpus, domain), mesh):
            here = labelled.batch.to(device)
            objective = Objective(here.targets_BS, ahead=False)
            losses: Losses = model(Inputs.of(here), options=options, objective=objective)
            reports = losses.reports.values()
            loads.add(reports if counts else [report.of_nothing() for report in reports])
            if not counts:
                continue
            nats += float(losses.nll)
            seen += int(losses.targets)
            domain_size += int(labelled.bytes_BS.sum())
            if progress is not None:
                progress(tokens + seen, whole)
        summed = mesh.world.sum(torch.tensor([nats, seen, domain_size], dtype=torch.float64)).tolist()
        nats, tokens, domain_size = summed[0], tokens + int(summed[1]), int(summed[2])
        if domain_size:
            domains[domain] = nats / math.log(2) / domain_size
            nats_per_token[domain] = nats / max(tokens - before, 1)
            size += domain_size
    if not domains:
        raise ConsiliumError(
            "evaluation: nothing of the held-out text is learned, so there are no bits per byte; give more"
            " text, or text with completions or answers."
        )
    return Evaluation(
        bits_per_byte=sum(domains.values()) / len(domains),
        domains=domains,
        tokens=tokens,
        bytes=size,
        documents=sum(len(corpus.held_out[domain].starts_N) for domain in domains),
        context=reading.context,
        stride=reading.stride or reading.context,
        causal=moe is None or moe.causal,
        loads=loads.result(mesh.world.sum),
        nats_per_token=nats_per_token,
    )
