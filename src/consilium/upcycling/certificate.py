"""How far a sparse model is from the one that it was made of, on text, before it is trained.

Legend: B rows, S tokens, D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from consilium.checkpoint.source import Source
from consilium.evaluation.walk import Difference, Passage, Visit, compare_ends, walk
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

    A layer's experts get what the network of ``dense`` got. ``promise`` is the largest relative error of the
    logits that the method promises, None where it promises none.
    """
    layers: list[LayerDifference] = []
    pairs = zip(walk(dense, text), walk(sparse, text), strict=True)
    last: tuple[Visit, Visit] | None = None
    for one, other in pairs:
        layers.append(_layer(one, other, text))
        last = one, other
        progress(len(layers), dense.config.layers)
    assert last is not None, "a model has a layer"
    ends = compare_ends((dense, sparse), text, last[0].after, last[1].after)
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
def _layer(one: Visit, other: Visit, text: Sequence[Passage]) -> LayerDifference:
    found = Difference()
    for passage, normed_BSD, expected_BSD in zip(text, one.normed, one.fed, strict=True):
        made = other.block.feed(normed_BSD, passage.inputs.tokens(), Mode())
        found = found.and_of(passage.tokens(made.x_BSD), passage.tokens(expected_BSD))
    load_E = [int(sum(loads)) for loads in zip(*(x.tolist() for x in other.loads), strict=True)]
    return LayerDifference(
        layer=one.layer, largest=found.largest, relative=found.relative, load=tuple(load_E)
    )
