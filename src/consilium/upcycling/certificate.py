"""How far a model is from the one that it was made of, on text, before it is trained.

Legend: B rows, S tokens, D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from consilium.checkpoint.source import Source
from consilium.evaluation.walk import Difference, Passage, Visit, attend, compare_ends, walk
from consilium.moe.types import Mode
from consilium.records.upcycling import Certificate, LayerDifference


def certify(
    dense: Source,
    sparse: Source,
    text: Sequence[Passage],
    *,
    promise: float | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Certificate:
    """Run both over ``text``, a block of each at a time, and compare layers and predictions.

    A layer's experts, or its attention where that is what changed, get what those of ``dense`` got.
    ``promise`` is the largest relative error of the logits that the method promises, None where it promises
    none.
    """
    layers: list[LayerDifference] = []
    others = walk(sparse, text)
    last: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
    for one in walk(dense, text):
        other = next(others)
        if dense.config.attention == sparse.config.attention:
            made = _fed(other, one, text)
            layers.append(_layer(other, made, one.fed, text))
        else:
            made, expected = _attended(other, sparse, one, text), _attended(one, dense, one, text)
            layers.append(_layer(other, made, expected, text))
        last = one.after, other.after
        progress(len(layers), dense.config.layers)
        del one, other  # their blocks go before the next are read
    assert last is not None, "a model has a layer"
    ends = compare_ends((dense, sparse), text, *last)
    return Certificate(
        tokens=ends.tokens,
        largest=ends.logits.largest,
        relative=ends.logits.relative,
        bits_per_byte_before=ends.bits_per_byte[0],
        bits_per_byte_after=ends.bits_per_byte[1],
        promise=promise,
        layers=tuple(layers),
    )


@torch.no_grad()
def _fed(visit: Visit, given: Visit, text: Sequence[Passage]) -> tuple[Tensor, ...]:
    """What the second half of a block makes of what that of another got."""
    pairs = zip(text, given.normed, strict=True)
    return tuple(visit.block.feed(x_BSD, p.inputs.tokens(), Mode()).x_BSD for p, x_BSD in pairs)


@torch.no_grad()
def _attended(visit: Visit, source: Source, given: Visit, text: Sequence[Passage]) -> tuple[Tensor, ...]:
    """What the first half of a block adds to what that of another got."""
    attended, _ = attend(visit.block, source.config, text, given.before)
    return tuple(y_BSD - x_BSD for y_BSD, x_BSD in zip(attended, given.before, strict=True))


def _layer(
    visit: Visit, made: Sequence[Tensor], expected: Sequence[Tensor], text: Sequence[Passage]
) -> LayerDifference:
    found = Difference()
    for passage, made_BSD, expected_BSD in zip(text, made, expected, strict=True):
        found = found.and_of(passage.tokens(made_BSD), passage.tokens(expected_BSD))
    load_E = [int(sum(loads)) for loads in zip(*(x.tolist() for x in visit.loads), strict=True)]
    return LayerDifference(
        layer=visit.layer, largest=found.largest, relative=found.relative, load=tuple(load_E)
    )
