"""A model measured on text: the public face of evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from consilium.checkpoint.folders import check_vocabulary
from consilium.config.model import Model
from consilium.data.corpus import measured_corpus, whole_documents
from consilium.data.documents import Text, stable_fraction
from consilium.data.paths import path_texts
from consilium.data.tokenizer import Tokenizer
from consilium.errors import ConsiliumError
from consilium.evaluation.bits import Evaluation, Reading, measure
from consilium.model.decoder import Decoder

LONGEST_CONTEXT: Final = 2048
"""Tokens that a prediction sees unless more are asked for: windows of a model's whole length take minutes."""


def evaluate(
    model: Decoder,
    tokenizer: Tokenizer,
    *,
    data: Path | str | None = None,
    texts: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    context: int | None = None,
    stride: int | None = None,
) -> Evaluation:
    """Measure bits per byte: of the files in ``data``, or of ``texts``, one list or one for each domain.

    ``context`` is the most tokens that a prediction sees, by default the model's length up to 2,048; windows
    begin every ``stride`` tokens, by default without overlap. Raises ConsiliumError for unusable text, for a
    context beyond the model, and for a tokenizer that has more tokens than the model.
    """
    if (data is None) == (texts is None):
        raise ConsiliumError("evaluate: give either data, a path, or texts.")
    found = _given(texts) if texts is not None else path_texts(Path(data or ""))
    check_vocabulary(tokenizer.vocab_size, model.config.vocab_size)
    reading = reading_of(model.config, context, stride)
    return measure(model.eval(), measured_corpus(whole_documents(found), tokenizer), reading)


def reading_of(config: Model, context: int | None, stride: int | None) -> Reading:
    """Settle context and stride. Raises ConsiliumError for what the model or the other one does not allow."""
    length = context or min(config.max_length, LONGEST_CONTEXT)
    if length > config.max_length:
        raise ConsiliumError(
            f"a context of {length} tokens is beyond the {config.max_length} that this model has; give --seq"
            f" {config.max_length} or less."
        )
    step = stride or length
    if not 0 < step <= length:
        raise ConsiliumError(
            f"a stride of {step} tokens would leave out text between windows of {length}; give --stride"
            f" {length} or less."
        )
    return Reading(length, step)


def limited(texts: Sequence[Text], limit: int | None) -> list[Text]:
    """Keep at most ``limit`` bytes of each domain: whole texts by the hash of names, the last one cut."""
    if limit is None:
        return list(texts)
    by_domain: dict[str, list[Text]] = {}
    for text in sorted(texts, key=lambda text: stable_fraction(text.name, salt="measured")):
        by_domain.setdefault(text.domain, []).append(text)
    return [kept for domain in sorted(by_domain) for kept in _first(by_domain[domain], limit)]


def _first(texts: Iterable[Text], limit: int) -> Iterable[Text]:
    for text in texts:
        if limit <= 0:
            return
        data = text.text.encode()
        cuts = isinstance(text.content, str) and len(data) > limit
        whole = data[:limit].decode(errors="ignore") if cuts else text.content
        limit -= len(data)
        if whole:
            yield dataclasses.replace(text, content=whole)


def _given(texts: Sequence[str] | Mapping[str, Sequence[str]]) -> list[Text]:
    if isinstance(texts, str):
        raise ConsiliumError("evaluate: texts is one text; give a list of texts, or a path as data.")
    domains = texts if isinstance(texts, Mapping) else {"text": texts}
    found = [
        Text(text, domain, f"{domain} {number}", f"{domain} {number}")
        for domain, members in domains.items()
        for number, text in enumerate(members)
        if text
    ]
    if not found:
        raise ConsiliumError("evaluate: there is no text to measure on.")
    return found
