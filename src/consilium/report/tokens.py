"""A page of text whose tokens have the colour of the expert that they use most, model below model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from consilium.records.tokens import ReadPassage, TokensRead
from consilium.report.build import PAGES, save, spaced
from consilium.words.say import language, say

COLOURS: Final = 8
"""Of the style sheet; experts that many apart share one."""
MOST_LAYERS: Final = 4


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
    page = PAGES.get_template("tokens.html.j2").render(
        say=say,
        language=language(),
        sections=[(layer, [_panel(one, layer) for one in read if layer in one.layers]) for layer in shown],
        hidden=len(layers) - len(shown),
        shared=any(one.experts > COLOURS for one in read),
    )
    return save(out, page)


def _panel(read: TokensRead, layer: int) -> Panel:
    place = read.layers.index(layer)
    shares = tuple(
        (_css((expert,)), say("expert {expert}: {share:.0%}", expert=expert, share=share))
        for expert, share in enumerate(read.shares(place))
        if share
    )
    return Panel(read.model, shares, tuple(_marks(passage, place) for passage in read.passages))


def _marks(passage: ReadPassage, place: int) -> tuple[Mark, ...]:
    pairs = zip(passage.pieces, passage.used[place], strict=True)
    return tuple(Mark(piece, _css(used), _title(used)) for piece, used in pairs if piece)


def _css(used: tuple[int, ...]) -> str:
    return f"c{used[0] % COLOURS}" if used else "none"


def _title(used: tuple[int, ...]) -> str:
    if not used:
        return say("no expert")
    return say("expert {experts}", experts=say(", ").join(map(str, used)))
