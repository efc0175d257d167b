"""Merges of byte-fallback BPE and the scores that llama.cpp's SentencePiece merges by: both ways.

It joins any two neighbours whose text is a token, highest score first. A list of merges says the same where
it has every way to make a token out of two others, and all ways of one token next to each other: then a
token's score is its place. SentencePiece's own models are like that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from consilium.errors import ConsiliumError

Merge = tuple[str, str]


def scores(vocabulary: Mapping[str, int], merges: Sequence[Merge], where: str) -> dict[str, float]:
    """Return the score of each token that merges make, falling from 0.

    Raises ConsiliumError where no scores do what ``merges`` do.
    """
    order = [token for token, _ in groupby(left + right for left, right in merges)]
    found = {token: -float(place) for place, token in enumerate(order)}
    lacking = next(_unlisted(vocabulary, set(merges)), None)
    if len(found) < len(order) or lacking is not None:
        why = "are out of order" if lacking is None else f"lack {lacking[0]!r} + {lacking[1]!r}"
        raise ConsiliumError(
            f"{where}: its merges {why}, so llama.cpp, which goes by scores, would tokenize differently;"
            " convert this model with llama.cpp's own script, or without tokenizer.json."
        )
    return found


def merges(scored: Mapping[str, float]) -> list[Merge]:
    """Return every way to make a token of ``scored`` out of two others, the highest score first.

    The tokens of equal score keep their order.
    """
    ranked = sorted(scored, key=lambda token: -scored[token])
    return [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in scored and token[cut:] in scored
    ]


def _unlisted(vocabulary: Mapping[str, int], merges: set[Merge]) -> Iterator[Merge]:
    """Pairs of tokens that spell another one and are no merge."""
    for token in vocabulary:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair not in merges and pair[0] in vocabulary and pair[1] in vocabulary:
                yield pair
