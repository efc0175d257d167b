"""More experts of a sparse model: each as often as asked (expert upcycling, 2604.19835).

Where a token uses as many times more of them as there are copies, all copies of an expert are chosen
together, each with its share of the weight: the model stays what it was. Else one copy of each has to be
chosen, and equal rows would choose an expert twice in place of two. So copy m of every expert gets the same
direction added to its gate row: the one that a token is farthest along decides which copies it uses, and
among those the experts are chosen and weighed as before. Directions are levelled: each decides for as many.
Where the scores of a softmax are weights as they are, what it gives to the other copies is made good in the
down matrices: a softmax over all copies is one over experts times one over directions.

Legend: E experts of the result, N of the source, M copies of each, T tokens, D hidden size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from consilium.checkpoint.source import Source
from consilium.config.generation import GenerationDefaults
from consilium.config.model import Model
from consilium.config.router import Raw
from consilium.config.upcycling import Upcycling
from consilium.evaluation.walk import Passage, walk
from consilium.planner.upcycled import FLAT, chosen_together, spread, weighs_copies_alike
from consilium.upcycling.gates import levelled, random_rows
from consilium.upcycling.source import stream
from consilium.upcycling.survey import Progress, tokens_of

_BY_EXPERT: Final = re.compile(
    r"(?:layers|mtp)\.(\d+)\.(?:block\.)?moe\."
    r"(experts\.(?:up|down)|router\.(?:projection|noise)\.(?:output\.)?(?:weight|bias)|balance\.bias_E)"
)


@final
@dataclass(frozen=True, slots=True)
class Expanded:
    """A ``Source``: expert e of the result is expert e mod N of ``sparse``, as copy e div N."""

    sparse: Source
    asked: Upcycling
    config: Model
    state: Mapping[str, Tensor]
    directions: Mapping[str, Tensor]
    """Of each copy [M, D], by the name of the gate; none where all copies are chosen together."""
    factors: Mapping[str, float]
    """Of the down matrices, by their names, where scores are weights and one copy is chosen."""

    @property
    def generation(self) -> GenerationDefaults:
        return self.sparse.generation

    def fill(self, name: str, target: Tensor) -> None:
        """Write our tensor ``name`` into ``target``, in its dtype."""
        found = _BY_EXPERT.fullmatch(name)
        if found is None:
            self.sparse.fill(name, target)
            return
        values = self.sparse.read(name)
        repeats = target.shape[0] // values.shape[0]
        made = values.repeat(repeats, *[1] * (values.ndim - 1))
        if found[2] == "router.projection.weight":
            self._apart(name, made, values.shape[0])
        made *= self.factors.get(name, 1.0)
        target.copy_(made)  # rounded as it will be written, whatever the dtype of who asks

    def fill_rows(self, name: str, target: Tensor, first: int) -> None:
        """The same of its rows from ``first`` on."""
        target.copy_(self.read(name, target.dtype)[first : first + target.shape[0]])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return our tensor ``name``, by default in the dtype that ``state`` says."""
        values = torch.zeros_like(self.state[name], dtype=dtype, device="cpu")
        self.fill(name, values)
        return values

    def _apart(self, name: str, rows: Tensor, kept: int) -> None:
        """Add its direction to each row, or noise of ``spread`` times their size to all copies but the first.

        Of noise at least so much that rounding leaves most of it: of equal rows the first gets every token.
        """
        if name in self.directions:
            rows += self.directions[name].repeat_interleave(kept, dim=0).to(rows.dtype)
            return
        noise = torch.randn(rows[kept:].shape, generator=stream(self.asked.seed, 0, name))
        size = rows[:kept].float().std() if rows[:kept].numel() > 1 else 1.0
        share = FLAT if self.directions else spread(self.asked)
        least = torch.finfo(rows.dtype).eps / 4
        rows[kept:] += (noise * size * max(share, least)).to(rows.dtype)


def expanded(bare: Expanded, text: Sequence[Passage], progress: Progress) -> Expanded:
    """``bare`` with the directions of its copies, where a token uses some of an expert's and not all."""
    if chosen_together(bare.sparse.config, bare.asked):
        return bare
    found: dict[str, Tensor] = {}
    factors: dict[str, float] = {}
    for seen in walk(bare.sparse, text):
        if bare.config.is_moe(seen.layer):
            moe, x_TD = f"layers.{seen.layer}.moe", tokens_of(text, seen.normed)
            gate = f"{moe}.router.projection.weight"
            found[gate] = _directions(gate, bare, x_TD)
            factors[f"{moe}.experts.down"] = _factor(bare.config, x_TD @ found[gate].T)
        progress("measuring", seen.layer + 1, bare.config.layers)
        del seen  # its block goes before the next is read
    return dataclasses.replace(bare, directions=found, factors=factors)


def _factor(model: Model, logits_TM: Tensor) -> float:
    """What brings a chosen copy's share of its expert's score nearest to 1, in least squares over tokens."""
    assert model.moe is not None, "expand has a sparse source"
    if not (isinstance(model.moe.router.weight, Raw) and weighs_copies_alike(model)):
        return 1.0
    share_T = logits_TM.softmax(dim=1).amax(dim=1)
    return float(share_T.mean() / share_T.square().mean())


def _directions(name: str, bare: Expanded, x_TD: Tensor) -> Tensor:
    """Of each copy [M, D]: logits ``spread`` times as far apart as those of experts, and free of them.

    Else experts that a direction is along would be chosen on its side more often than on others.
    """
    rows_ND = bare.sparse.read(name, torch.float32)
    copies = len(bare.state[name]) // len(rows_ND)
    apart_TD = x_TD - x_TD.mean(0)
    logits_TN = apart_TD @ rows_ND.T
    rows_MD = random_rows(copies, x_TD.shape[1], stream(bare.asked.seed, 0, name))
    along_NM = torch.linalg.lstsq(logits_TN, apart_TD @ rows_MD.T).solution
    size = float(logits_TN.std(0).mean())
    return levelled(rows_MD - along_NM.T @ rows_ND, x_TD, 1, spread(bare.asked) * size)
