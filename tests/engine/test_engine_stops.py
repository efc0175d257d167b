from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.engine import rows
from consilium.engine.engine import Engine
from consilium.engine.request import Piece, Request
from consilium.engine.stops import StopText
from engine.codecs import Bytes
from small import DENSE, lively

words = st.text("ab\n", min_size=1, max_size=4)


def all_at_once(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """The text up to the first stop of the shortest beginning of ``pieces`` that has one."""
    text = ""
    for piece in pieces:
        text += piece
        if found := [text.index(stop) for stop in stops if stop in text]:
            return text[: min(found)], True
    return text, False


@given(st.lists(st.text("ab\n", max_size=3), max_size=12), st.lists(words, max_size=3))
def test_streamed_text_is_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    stream, shown = StopText(stops), ""
    for piece in pieces:
        shown += stream.push(piece)
        assert all_at_once(pieces, stops)[0].startswith(shown)
    found = stream.found
    assert (shown + stream.finish(), found) == all_at_once(pieces, stops)


@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=12))
def test_nothing_is_held_back_that_cannot_become_a_stop(pieces: list[str]) -> None:
    stream, shown = StopText(["bbb"]), ""
    for piece in pieces:
        shown += stream.push(piece)
        if stream.found:
            return
    text = "".join(pieces)
    assert shown == text[: len(text) - min(len(text) - len(text.rstrip("b")), 2)]


def test_what_a_stop_text_held_stands_in_front_of_a_marker() -> None:
    """No stop text reaches across a token that is no text."""
    tokens = [*b"plan END", 256, *b"ING on"]
    engine = Engine(lively(DENSE), Bytes())
    bias = iter(tokens)
    pieces: list[Piece] = []
    number = engine.submit(Request(prompt="q", max_tokens=len(tokens), stop=("ENDING",), stop_ids=()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "sample", lambda *given: (next(bias), 0.0))
        while engine.busy:
            pieces += [piece for piece in engine.step() if piece.request == number]
    place = [piece.token for piece in pieces].index(256)
    assert "".join(piece.text for piece in pieces[: place + 1]) == "plan END"
    assert "".join(piece.text for piece in pieces) == "plan ENDING on"
