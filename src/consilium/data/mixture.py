"""Which share of the rows each domain gets: what the user gave, and the rest by size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from consilium.config.data import Data, Dynamic, Given, Preset, Source, spelled
from consilium.errors import ConsiliumError, nearest

Owners = Mapping[str, Sequence[int]]
"""Domain -> the sources, by place in ``Data.sources``, that have text of it; all where it is absent."""


LLAMA: Final[Mapping[str, float]] = MappingProxyType(
    {"cc": 0.67, "c4": 0.15, "github": 0.045, "wiki": 0.045, "book": 0.045, "arxiv": 0.025, "stack": 0.02}
)
SHEARED: Final[Mapping[str, float]] = MappingProxyType(
    {"cc": 0.361, "c4": 0.492, "github": 0.008, "wiki": 0.031, "book": 0.091, "arxiv": 0.007, "stack": 0.01}
)
"""Both as in LLaMA-MoE, 2406.16554."""


def start_shares(data: Data, sizes: Mapping[str, int], owners: Owners) -> dict[str, float]:
    """Return the share of the rows of each domain of ``sizes``, in tokens, at the first step.

    Raises ConsiliumError for weights that do not fit the text.
    """
    match data.mixture:
        case Given() | Dynamic(start="given"):
            return domain_shares(data, sizes, owners)
        case Preset(name="sheared"):
            return _preset(data, SHEARED, sizes)
        case Preset() | Dynamic(start="llama"):
            return _preset(data, LLAMA, sizes)
        case Dynamic():
            _refuse_weights(data)
            return dict.fromkeys(sizes, 1 / len(sizes))


def next_shares(
    dynamic: Dynamic, shares: Mapping[str, float], losses: Mapping[str, float], reference: Mapping[str, float]
) -> dict[str, float]:
    """W <- softmax(log w + rate (loss - reference)), then shrunk so far that nothing is below the floor.

    Losses are nats a token. Raises ConsiliumError where the floor leaves nothing to share, and for a domain
    without a loss.
    """
    for domain in (domain for domain in shares if domain not in losses):
        raise ConsiliumError(
            f"data.mixture: shares follow held-out losses, and domain {domain!r} has no held-out text that is"
            " learned; give more of it, or raise data.held_out."
        )
    left = 1 - dynamic.floor * len(shares)
    if left <= 0:
        raise ConsiliumError(
            f"data.mixture: {len(shares)} domains at a floor of {dynamic.floor:g} each are more than there"
            " is; lower the floor."
        )
    raised = {d: math.log(w) + dynamic.rate * (losses[d] - reference[d]) for d, w in shares.items()}
    largest = max(raised.values())
    powers = {domain: math.exp(value - largest) for domain, value in raised.items()}
    total = sum(powers.values())
    return {domain: dynamic.floor + left * power / total for domain, power in powers.items()}


def _preset(data: Data, weights: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    _refuse_weights(data)
    for domain in sizes:
        if domain not in weights:
            raise ConsiliumError(
                f"data.mixture: the preset has no domain {domain!r}; name the sources as its own."
                f"{nearest(domain, weights)}"
            )
    total = sum(weights[domain] for domain in sizes)
    return {domain: weights[domain] / total for domain in sizes}


def _refuse_weights(data: Data) -> None:
    for source in data.sources:
        if source.weight is not None or source.weights:
            raise ConsiliumError(
                f"data.mixture sets all shares, and {spelled(source)} has a weight; take one of them out."
            )


def domain_shares(data: Data, sizes: Mapping[str, int], owners: Owners) -> dict[str, float]:
    """Return the shares that the weights of the sources give the domains of ``sizes``; they sum to 1.

    First the sources divide the rows, then each source divides its own among its domains; both times what has
    a weight gets it and what has none shares the rest by size ** temperature. Raises ConsiliumError for
    weights that leave nothing to others, that name no domain, and where domains of a weighted source are also
    another source's.
    """
    own = [i for i, source in enumerate(data.sources) if source.weight is not None or source.weights]
    members: dict[int, list[str]] = {i: [] for i in own}
    common: list[str] = []
    for domain in sizes:
        of = owners.get(domain, range(len(data.sources)))
        weighted = [i for i in own if i in of]
        if weighted and len(of) > 1:
            raise ConsiliumError(_ambiguous(data, domain, of))
        (members[weighted[0]] if weighted else common).append(domain)
    scaled = {domain: size**data.temperature for domain, size in sizes.items()}
    inside = {i: _inside(data.sources[i], members[i], scaled) for i in own}
    whole = {str(i): sum(scaled[domain] for domain in members[i]) for i in own}
    given = {str(i): weight for i in own if (weight := data.sources[i].weight) is not None}
    # Domains are named apart from the places of sources, which are digits as well.
    alone = {f"domain {domain}": scaled[domain] for domain in common}
    divided = _divided(whole | alone, given, "the sources", "source")
    shares = {domain: divided[f"domain {domain}"] for domain in common}
    shares |= {domain: divided[str(i)] * part for i in own for domain, part in inside[i].items()}
    return {domain: shares[domain] for domain in sizes}


def _inside(source: Source, domains: Sequence[str], scaled: Mapping[str, float]) -> dict[str, float]:
    name = spelled(source)
    if not domains:
        raise ConsiliumError(
            f"data: {name} has a weight, and none of its domains fills a sequence; give more text of it, or"
            " lower --seq."
        )
    for domain in source.weights:
        if domain not in domains:
            raise ConsiliumError(
                f"data: {name} has no domain {domain!r} that fills a sequence.{nearest(domain, domains)}"
            )
    return _divided({d: scaled[d] for d in domains}, source.weights, f"the domains of {name}", "domain")


def _divided(sizes: Mapping[str, float], given: Mapping[str, float], what: str, one: str) -> dict[str, float]:
    """Shares of what ``sizes`` name: as ``given``, relative where all are, the rest in proportion to size."""
    total = sum(given.values())
    if len(given) == len(sizes):
        return {name: given[name] / total for name in sizes}
    if total >= 1:
        raise ConsiliumError(
            f"data: the weights of {what} sum to {total:g}, which leaves nothing for those without one; lower"
            f" them, or give every {one} a weight."
        )
    open_sizes = sum(size for name, size in sizes.items() if name not in given)
    return {name: given.get(name, (1 - total) * size / open_sizes) for name, size in sizes.items()}


def _ambiguous(data: Data, domain: str, of: Sequence[int]) -> str:
    first, second = (spelled(data.sources[i]) for i in list(of)[:2])
    return (
        f"data: {first} and {second} both have text of domain {domain!r}, and one of them has a weight; name"
        f" their domains apart, such as --data {domain}2=PATH:0.5."
    )
