"""A dense model visited layer by layer on text, to decide on cuts, and the sparse one beside it, for gates.

Gates are levelled on what they will get: the states of the sparse model, whose layers before are settled.
Blocks run on the device that the text is on; cuts and gates are settled on the CPU.

Legend: D hidden size, E experts, F width of a network, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from consilium.config.upcycling import BranchTrainMix, HiddenStates, Upcycling
from consilium.errors import ConsiliumError
from consilium.evaluation.walk import (
    Passage,
    Visit,
    attend,
    block_of,
    embedded,
    importances,
    visit,
    walk,
)
from consilium.model.block import Block
from consilium.planner.upcycled import spread
from consilium.upcycling.compose import Pointers
from consilium.upcycling.cut import Cut, Network, cut, needs_gradients
from consilium.upcycling.gates import vague
from consilium.upcycling.source import Upcycled, stream

Progress = Callable[[str, int, int], None]
"""Hears what is being done, how much of it is done, and how much there is: of ``taking`` bytes of disk."""


def survey(bare: Upcycled, text: Sequence[Passage], progress: Progress) -> Upcycled:
    """Return ``bare`` with the cut and the gate of every sparse layer."""
    cuts = _cuts_by_gradients(bare, text, progress) if needs_gradients(bare.asked) else {}
    made = dataclasses.replace(bare, cuts=cuts)
    pointers = None if bare.composed is None else bare.composed.pointers
    read = [*text, *(() if pointers is None else pointers.passages)]
    states = embedded(bare.dense, read)
    told = None if pointers is None else _Told(pointers, len(text), states)
    for seen in walk(bare.dense, text):
        if bare.config.is_moe(seen.layer):
            made, states = _settled(made, seen, read, states, told)
        else:
            states = visit(seen.block, bare.dense.config, read, states).after
        progress("measuring", seen.layer + 1, bare.config.layers)
        del seen  # its block goes before the next is read
    return made


@final
@dataclass(frozen=True, slots=True)
class _Told:
    """Prompts that run behind the text, from passage ``first`` on."""

    pointers: Pointers
    first: int
    embedded: tuple[Tensor, ...]

    def rows(self, asked: Upcycling, normed: Sequence[Tensor], x_TD: Tensor) -> Tensor:
        """Directions [E, D] of a gate that gets ``normed``, of which ``x_TD`` is the text.

        Raises ConsiliumError where prompts tell an expert from no other.
        """
        assert isinstance(asked.method, BranchTrainMix), "no other method has prompts"
        by_layer = isinstance(asked.method.directions, HiddenStates)
        rows_ED = self.pointers.rows((normed if by_layer else self.embedded)[self.first :])
        for expert in vague(rows_ED, x_TD).nonzero().flatten().tolist():
            raise ConsiliumError(
                f"upcycle: the prompts of expert {expert} point nowhere, or where those of an earlier one do,"
                " so nothing would tell it apart; give it others."
            )
        return rows_ED


@torch.no_grad()
def _settled(
    made: Upcycled,
    seen: Visit,
    read: Sequence[Passage],
    states: tuple[Tensor, ...],
    told: _Told | None,
) -> tuple[Upcycled, tuple[Tensor, ...]]:
    """Decide on one layer, and run the sparse model through it. ``read`` is the text, then prompts."""
    layer, asked, config = seen.layer, made.asked, made.config
    text = read if told is None else read[: told.first]
    plan = (
        made.cuts[layer] if layer in made.cuts else _cut(made, layer, _network(seen.block, seen.normed, text))
    )
    _, normed = attend(seen.block, config, read, states)
    x_TD = tokens_of(text, normed[: len(text)])
    if told is not None:
        plan = dataclasses.replace(plan, rows_CD=told.rows(asked, normed, x_TD))
    gate_ED = plan.gate(x_TD, asked.top_k, spread(asked))
    made = dataclasses.replace(made, cuts={**made.cuts, layer: plan}, gates={**made.gates, layer: gate_ED})
    after = visit(block_of(made, layer, text[0].device), config, read, states).after
    return made, after


def _cut(made: Upcycled, layer: int, network: Network) -> Cut:
    return cut(network, made.asked, stream(made.asked.seed, layer, "cut"))


def _cuts_by_gradients(bare: Upcycled, text: Sequence[Passage], progress: Progress) -> Mapping[int, Cut]:
    """Forwards for the inputs of all blocks, backwards for the importance of neurons."""
    before: dict[int, tuple[Tensor, ...]] = {}
    normed: dict[int, tuple[Tensor, ...]] = {}
    layers = bare.config.layers
    for seen in walk(bare.dense, text):
        normed[seen.layer], before[seen.layer], before[layers] = seen.normed, seen.before, seen.after
        del seen
    cuts: dict[int, Cut] = {}
    for block, importance_TF in importances(bare.dense, text, before):
        if bare.config.is_moe(block.layer):
            network = _network(block, normed[block.layer], text, importance_TF)
            cuts[block.layer] = _cut(bare, block.layer, network)
        progress("weighing", layers - block.layer, layers)
        del block
    return cuts


def _network(
    block: Block, normed: Sequence[Tensor], text: Sequence[Passage], importance_TF: Tensor | None = None
) -> Network:
    found = block.feed_forward
    assert found is not None, "the source is dense"
    x_TD = tokens_of(text, normed)
    importance_TF = None if importance_TF is None else importance_TF.cpu()
    return Network(found.up.weight.cpu(), found.down.weight.cpu(), found.activation, x_TD, importance_TF)


def tokens_of(text: Sequence[Passage], states: Sequence[Tensor]) -> Tensor:
    """The states [T, D] of all tokens that are text."""
    return torch.cat([passage.tokens(x_BSD).cpu() for passage, x_BSD in zip(text, states, strict=True)])
