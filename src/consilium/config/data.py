"""The text of a run: where it comes from and in which shares it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from consilium.config.base import Size, configuration
from consilium.errors import ConsiliumError

Weight = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]


@configuration
class BuiltIn:
    """Text that every Python ships (code, prose, docstrings), generated mathematics and bilingual text."""

    kind: Literal["builtin"] = "builtin"
    weight: Weight | None = None
    """As that of ``TextPath``."""
    weights: Mapping[Name, Weight] = Field(default_factory=dict[Name, Weight])
    """As those of ``TextPath``."""


@configuration
class TextPath:
    """The user's own text: a file or a folder of files."""

    kind: Literal["path"] = "path"
    path: str
    domain: Name | None = None
    """Of all its texts; by default a record's own, else the first folder below ``path``, else the suffix."""
    weight: Weight | None = None
    """Share of all rows, hence of all tokens. Sources without one share what is left, by size ** temperature;
    where every source has one, weights are relative."""
    weights: Mapping[Name, Weight] = Field(default_factory=dict[Name, Weight])
    """Shares of this source by domain. Its domains without one share what is left, by size ** temperature;
    where every domain has one, weights are relative."""


Source = Annotated[BuiltIn | TextPath, Field(discriminator="kind")]

BUILT_IN: Final = "builtin"
"""What the built-in text is called where sources are spelled; a folder of that name is ``./builtin``."""
_SPELLING: Final = re.compile(
    r"(?:(?P<domain>[^=/\\:]+)=)?(?P<path>.+?)(?::(?P<weight>[0-9]*\.?[0-9]+))?", re.DOTALL
)
_AS: Final = "write [NAME=]PATH[:WEIGHT], such as notes.txt, notes.txt:0.3 or code=src:0.7"


def spelled(source: Source) -> str:
    """Return ``source`` as ``read_source`` takes it; weights of its domains have no place there."""
    weight = "" if source.weight is None else f":{source.weight:g}"
    match source:
        case BuiltIn():
            return f"{BUILT_IN}{weight}"
        case TextPath(path=path, domain=domain):
            return f"{'' if domain is None else f'{domain}='}{path}{weight}"


def read_source(text: str, *, where: str = "--data") -> Source:
    """Read ``[NAME=]PATH[:WEIGHT]``; ``builtin`` is a path too. What exists under the whole text is a path.

    Raises ConsiliumError for a name of the built-in text, which has several domains, and for what is no
    weight.
    """
    match = _SPELLING.fullmatch(text)
    if match is None or Path(text).exists():
        return TextPath(path=text)
    domain, path, weight = match["domain"], match["path"], match["weight"]
    before, colon, behind = path.rpartition(":")
    if weight is None and colon and before and (before == BUILT_IN or Path(before).exists()):
        raise ConsiliumError(f"{where} {text}: {behind!r} is no weight; {_AS}.")
    if weight is not None and not float(weight) > 0:
        raise ConsiliumError(f"{where} {text}: a weight is above 0; leave out what is not to be read.")
    share = None if weight is None else float(weight)
    if path != BUILT_IN:
        return TextPath(path=path, domain=domain, weight=share)
    if domain is not None:
        raise ConsiliumError(f"{where} {text}: the built-in text has domains of its own; drop {domain}=.")
    return BuiltIn(weight=share)


@configuration
class Given:
    """The weights of the sources, from the first step to the last."""

    kind: Literal["given"] = "given"


@configuration
class Preset:
    """Static weights of LLaMA or of Sheared LLaMA (2310.06694), for SlimPajama's domains by their names."""

    kind: Literal["preset"] = "preset"
    name: Literal["llama", "sheared"] = "sheared"


@configuration
class Measured:
    """Reference losses of a model on the held-out text: that of a folder, else the run's own at its start."""

    kind: Literal["measured"] = "measured"
    path: str | None = None


@configuration
class Losses:
    """Reference losses in nats a token, one for each domain."""

    kind: Literal["losses"] = "losses"
    losses: Annotated[Mapping[Name, float], Field(min_length=1)]


Reference = Annotated[Measured | Losses, Field(discriminator="kind")]


@configuration
class Dynamic:
    """Shares that follow the held-out losses (2310.06694, as in LLaMA-MoE, 2406.16554).

    Every ``every`` steps w <- softmax(log w + rate (loss - reference)), and no share below ``floor``.
    """

    kind: Literal["dynamic"] = "dynamic"
    start: Literal["given", "llama", "uniform"] = "uniform"
    """The shares before the first change: the sources' weights, LLaMA's, or all alike."""
    every: Size = 340
    rate: Weight = 1.0
    floor: Annotated[float, Field(ge=0, lt=1)] = 1e-4
    reference: Reference = Measured()


Mixture = Annotated[Given | Preset | Dynamic, Field(discriminator="kind")]


Chance = Annotated[float, Field(gt=0, lt=1)]


@configuration
class Advertisement:
    """Drops texts that are advertisements (2406.16554)."""

    kind: Literal["advertisement"] = "advertisement"
    least: Chance = 0.5
    """Texts below this chance of being none are dropped."""


@configuration
class Fluency:
    """Drops texts that are no fluent language: lists of words, repetitions, garbled letters (2406.16554)."""

    kind: Literal["fluency"] = "fluency"
    least: Chance = 0.5
    """Texts below this chance of being fluent are dropped."""


Filter = Annotated[Advertisement | Fluency, Field(discriminator="kind")]


@configuration
class Data:
    sources: Annotated[tuple[Source, ...], Field(min_length=1)] = (BuiltIn(),)
    """Domains of the same name in several sources without weights are one domain."""
    sequence_length: Size = 128
    """Tokens a packed sequence."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of files held out for validation."""
    temperature: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Domains without a weight are sampled in proportion to size ** temperature: 1 is by size, 0 uniform."""
    mixture: Mixture = Given()
    filters: tuple[Filter, ...] = ()
    """What takes texts out before the split, one after the other."""
