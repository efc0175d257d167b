"""A page of text whose tokens have the colour of the expert that they use most, model below model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from consilium.records.tokens import ReadPassage, TokensRead
from consilium.report.build import PAGES, save, spaced
from consilium.words.say import language, say

COLOURS: Final = 8
"""Of the style sheet, one each for the experts used most."""
MOST_LAYERS: Final = 4
_MOST_BREAKS: Final = 2
"""Line breaks in a row that are drawn as such: a screen of blank lines shows nothing."""


@final
@dataclass(frozen=True, slots=True)
class Mark:
    """A token as it is drawn."""

    piece: str
    css: str
    title: str


@final
@dataclass(frozen=True, slots=True)
class Panel:
    """What one model did in one layer."""

    model: str
    shares: tuple[tuple[str, str], ...]
    """Class and words, by expert."""
    passages: tuple[tuple[Mark, ...], ...]


def build_tokens_page(read: Sequence[TokensRead], out: Path) -> Path:
    """Write the page to ``out`` and return it: a section for each of at most four layers."""
    layers = sorted({layer for one in read for layer in one.layers})
    shown = [layers[place] for place in spaced(len(layers), MOST_LAYERS)]
    colours = {layer: _colours(read, layer) for layer in shown}
    page = PAGES.get_template("tokens.html.j2").render(
        say=say,
        language=language(),
        sections=[
            (layer, [_panel(one, layer, colours[layer]) for one in read if layer in one.layers])
            for layer in shown
        ],
        hidden=len(layers) - len(shown),
        shared=any(len(found) > COLOURS for found in colours.values()),
    )
    return save(out, page)


def _colours(read: Sequence[TokensRead], layer: int) -> dict[int, str]:
    """Classes of the experts used in ``layer``, the same for all models, so that they compare."""
    shares = [one.shares(one.layers.index(layer)) for one in read if layer in one.layers]
    total = [sum(of_expert) for of_expert in itertools.zip_longest(*shares, fillvalue=0.0)]
    used = [expert for expert, share in enumerate(total) if share]
    if len(total) > COLOURS:
        used.sort(key=lambda expert: -total[expert])
        return {expert: f"c{rank % COLOURS}" for rank, expert in enumerate(used)}
    return {expert: f"c{expert}" for expert in used}


def _panel(read: TokensRead, layer: int, colours: Mapping[int, str]) -> Panel:
    place = read.layers.index(layer)
    shares = tuple(
        (colours[expert], say("expert {expert}: {share:.0%}", expert=expert, share=share))
        for expert, share in enumerate(read.shares(place))
        if share
    )
    return Panel(
        read.model, shares, tuple(tuple(_marks(passage, place, colours)) for passage in read.passages)
    )


def _marks(passage: ReadPassage, place: int, colours: Mapping[int, str]) -> Iterator[Mark]:
    breaks = 0
    for piece, used in zip(passage.pieces, passage.used[place], strict=True):
        drawn = ""
        for letter in piece:
            breaks = breaks + 1 if letter == "\n" else 0
            drawn += "\N{RETURN SYMBOL}" if breaks > _MOST_BREAKS else letter
        if drawn:
            yield Mark(drawn, colours[used[0]] if used else "none", _title(used))


def _title(used: tuple[int, ...]) -> str:
    if not used:
        return say("no expert")
    return say("expert {experts}", experts=say(", ").join(map(str, used)))
