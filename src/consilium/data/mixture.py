"""Which share of the rows each domain gets: what the user gave, and the rest by size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from consilium.config.data import Data, Source, spelled
from consilium.errors import ConsiliumError, nearest

Owners = Mapping[str, Sequence[int]]
"""Domain -> the sources, by place in ``Data.sources``, that have text of it; all where it is absent."""


def domain_shares(data: Data, sizes: Mapping[str, int], owners: Owners) -> dict[str, float]:
    """Return the share of the rows of each domain of ``sizes``, in tokens; shares sum to 1.

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
