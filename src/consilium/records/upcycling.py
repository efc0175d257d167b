"""What an upcycling was made of and how far from it it is: the file beside the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from pydantic.dataclasses import dataclass

from consilium.records.io import STRICT

NAME: Final = "upcycling.json"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LayerDifference:
    """What a layer's changed part makes of what its source got, beside what that made of it.

    The experts, or attention where the feed-forward stays.
    """

    layer: int
    largest: float
    """|difference| of an element."""
    relative: float
    """Euclidean norm of the difference over that of what the network made."""
    load: tuple[int, ...]
    """Tokens of each expert, in the sparse model; empty where the layer stays dense."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Certificate:
    """Two models on the same text, logits and bits per byte."""

    tokens: int
    largest: float
    relative: float
    bits_per_byte_before: float
    bits_per_byte_after: float
    promise: float | None
    """The largest relative error that the method promises; None where it promises none."""
    layers: tuple[LayerDifference, ...]

    @property
    def kept(self) -> bool:
        return self.promise is None or self.relative <= self.promise


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Origin:
    """A model that one expert comes from."""

    name: str
    """Of the folder or file."""
    sha256: str
    """Of its weights by our names, whatever their format."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Lineage:
    """From what, how, and which neurons each expert got: enough to make the same bits again."""

    schema: Literal[1] = 1
    source: str
    """Name of the folder or file."""
    source_sha256: str
    """Of its weights by our names, whatever their format."""
    text_sha256: str
    """Of the calibration text."""
    upcycling: Mapping[str, Any]
    """The configuration, as ``consilium.config.upcycling`` reads it."""
    threads: int
    torch: str
    """Version. Sums of other threads or versions round otherwise, and clusters of tied neurons with them."""
    dtype: str | None = None
    """What the weights were asked in; None is that of the source."""
    device: str = "cpu"
    certificate: Certificate
    neurons: Sequence[Sequence[Sequence[int]]] = ()
    """By sparse layer and routed expert; none where experts are copies or their shards in order."""
    shared: Sequence[Sequence[int]] = ()
    """By sparse layer: neurons of the shared experts; none where they have none or the whole network."""
    experts: Sequence[Origin] = ()
    """By expert, where each is of a model of its own."""
