from __future__ import annotations

import numpy as np
import pytest
from data_corpora import CODE
from hypothesis import given
from hypothesis import strategies as st

from consilium.data.syntax import CLASSES, UNKNOWN, label_tokens


def labels_of(source: str, pieces: list[str]) -> list[str]:
    assert "".join(pieces) == source
    sizes = np.array([len(piece.encode()) for piece in pieces])
    return [CLASSES[label] for label in label_tokens(source, sizes).tolist()]


def test_each_token_has_the_class_of_its_first_solid_byte() -> None:
    pieces = ["def", " f", "(", "x", "):", "\n", "   ", " return", " x", " +", " 1", ".5", "  # é", "t\n"]
    assert labels_of("".join(pieces), pieces) == [
        *("keyword", "name", "operator", "name", "operator", "space", "space"),
        *("keyword", "name", "operator", "number", "number", "comment", "comment"),
    ]


def test_columns_after_letters_of_several_bytes_are_right() -> None:
    pieces = ["größe", " =", " 'ü", "ß'", " +", " 你", "好", "\n"]
    assert labels_of("".join(pieces), pieces) == [
        *("name", "operator", "string", "string", "operator", "name", "name", "space")
    ]


def test_blanks_inside_a_string_are_string_and_elsewhere_space() -> None:
    pieces = ["'''a", "  \n  ", "b'''", "\n", "  ", "\n"]
    assert labels_of("".join(pieces), pieces) == ["string", "string", "string", "space", "space", "space"]


def test_a_token_that_starts_in_blanks_and_ends_in_code_has_the_class_of_the_code() -> None:
    assert labels_of("if a:\n  b\n", ["if", " a", ":", "\n  b", "\n"])[3] == "name"


def test_the_pieces_of_an_f_string_that_are_text_are_strings() -> None:
    assert labels_of("f'ab'\n", ["f'", "ab", "'", "\n"]) == ["string", "string", "string", "space"]


@pytest.mark.parametrize("source", ["(", "'''open", "  a\n b\n"])
def test_what_python_cannot_tokenize_is_unknown(source: str) -> None:
    sizes = np.ones(len(source), dtype=np.int64)
    assert label_tokens(source, sizes).tolist() == [UNKNOWN] * len(source)


@given(st.data())
def test_labels_do_not_depend_on_how_the_text_is_cut(data: st.DataObject) -> None:
    size = len(CODE.encode())
    cuts = sorted(data.draw(st.sets(st.integers(1, size - 1))))
    sizes = np.diff([0, *cuts, size])
    labels = label_tokens(CODE, sizes)
    single = label_tokens(CODE, np.ones(size, dtype=np.int64))
    content = CODE.encode()
    for start, length, label in zip([0, *cuts], sizes.tolist(), labels.tolist(), strict=True):
        solid = [place for place in range(start, start + length) if not content[place : place + 1].isspace()]
        assert label == single[solid[0] if solid else start]
