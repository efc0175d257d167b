"""What is known about one published system: its sizes as configurations, and its facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, final

from consilium.config.model import Model
from consilium.errors import ConsiliumError, nearest
from consilium.recipes.layout import Table

LEGEND: Final = "x or u a token's hidden state; E routed experts; k those it visits; S the selected; T tokens"
"""Letters of the equations of recipes."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Parameter counts as the authors print them (empty: not printed), and what the print leaves open.

    ``skeleton="other"``: published around other parts (an encoder-decoder, LSTMs, Mamba-2), so that the total
    of our decoder of the same experts differs from the print.
    """

    total: str
    active: str = ""
    note: str = ""
    skeleton: Literal["same", "other"] = "same"


@final
@dataclass(frozen=True, slots=True)
class HuggingFace:
    """The layout in which checkpoints of this system are published.

    An architecture of transformers, or the authors' own code beside it, such as Grok-1's.
    """

    model_type: str
    architecture: str
    tensors: Table
    """Names on disk of our tensors, read in both directions."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A published system. ``sizes`` lists the largest published size first; ``tiny`` is ours, for a CPU."""

    name: str
    title: str
    year: int
    paper: str
    """arXiv identifier, journal and pages, or the address of the release."""
    sizes: Mapping[str, Model]
    published: Mapping[str, Published]
    choices: tuple[str, ...]
    """What the system decided, one sentence a choice."""
    equations: tuple[str, ...]
    """Router, weights, output and losses, each with its number in the paper where that is known.

    x is a token's hidden state, E the routed experts, k those it visits, T the tokens, S the selected.
    """
    deviations: tuple[str, ...] = ()
    """Where released code or this recipe differs from the paper."""
    hugging_face: HuggingFace | None = None

    @property
    def largest(self) -> str:
        return next(iter(self.sizes))

    def model(self, size: str | None = None) -> Model:
        """Return the configuration of ``size``, by default the largest. Raises ConsiliumError if unknown."""
        chosen = self.largest if size is None else size
        if chosen not in self.sizes:
            raise ConsiliumError(f"{self.name} has no size {chosen!r}.{nearest(chosen, self.sizes)}")
        return self.sizes[chosen]
