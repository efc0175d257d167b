"""Observed passes over held-out text: which experts take which tokens.

Legend: B rows, S tokens, T = B * S flat tokens.
"""

from __future__ import annotations

import torch

from consilium.analysis.specialisation import UNLABELLED, SpecialisationCounter
from consilium.data.corpus import Corpus
from consilium.data.loader import held_out_batches
from consilium.data.syntax import CLASSES
from consilium.model.decoder import Decoder
from consilium.model.types import Inputs, Options
from consilium.moe.types import Mode
from consilium.records.specialisation import Specialisation


@torch.no_grad()
def observe_specialisation(
    model: Decoder, corpus: Corpus, *, sequence_length: int = 256, batch: int = 8, limit_tokens: int = 16_384
) -> Specialisation:
    """Route at most ``limit_tokens`` held-out tokens a domain and relate experts to domains and to syntax.

    Padding has no label and is left out; syntax labels exist for code alone.
    """
    counter = SpecialisationCounter()
    options = Options(mode=Mode(observer=counter))
    for number, domain in enumerate(corpus.domains):
        for labelled in held_out_batches(corpus, domain, sequence_length, batch, limit_tokens=limit_tokens):
            valid_T = labelled.batch.valid_BS.flatten()
            domain_T = torch.where(valid_T, number, UNLABELLED)
            syntax_T = torch.where(valid_T, labelled.syntax_BS.flatten().long(), UNLABELLED)
            counter.label(domain_T, syntax_T)
            model.hidden(Inputs.of(labelled.batch), options=options)
    return counter.result(corpus.domains, CLASSES)
