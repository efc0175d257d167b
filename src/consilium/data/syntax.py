"""What Python's own tokenizer says of each token of a source file.

Legend: N bytes of a source, T tokens.
"""

from __future__ import annotations

import io
import keyword
import tokenize
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

CLASSES = ("space", "keyword", "name", "operator", "number", "string", "comment")
"""Names of the syntactic classes; a label is an index into them."""
UNKNOWN = -1

SPACE, KEYWORD, NAME, OPERATOR, NUMBER, STRING, COMMENT = range(len(CLASSES))
OF_TYPE = {tokenize.OP: OPERATOR, tokenize.NUMBER: NUMBER, tokenize.STRING: STRING, tokenize.COMMENT: COMMENT}
BLANKS = np.frombuffer(b" \t\n\r\f", dtype=np.uint8)


def label_tokens(source: str, sizes_T: NDArray[np.integer[Any]]) -> NDArray[np.int8]:
    """Label the tokens of ``source``, of ``sizes_T`` bytes each, by what covers the first byte not blank.

    A token of blanks alone has the class of its first byte: "string" inside a string, else "space". All
    labels are UNKNOWN where Python cannot tokenize the source.
    """
    labels_N = _label_bytes(source)
    if labels_N is None:
        return np.full(len(sizes_T), UNKNOWN, dtype=np.int8)
    bytes_N = np.frombuffer(source.encode(), dtype=np.uint8)
    ends_T = np.cumsum(sizes_T)
    starts_T = ends_T - sizes_T
    # For every byte the nearest one at or after it that is not blank; N where there is none.
    solid_N = np.where(np.isin(bytes_N, BLANKS), len(bytes_N), np.arange(len(bytes_N)))
    solid_N = np.minimum.accumulate(solid_N[::-1])[::-1]
    # A token without a byte, such as a blank put in front, has the class of what follows it.
    starts_T = np.minimum(starts_T, len(bytes_N) - 1)
    solid_T = solid_N[starts_T]
    return labels_N[np.where(solid_T < ends_T, solid_T, starts_T)]


def _label_bytes(source: str) -> NDArray[np.int8] | None:
    lines = source.split("\n")
    starts = np.cumsum([0, *(len(line.encode()) + 1 for line in lines)])
    labels_N = np.full(len(source.encode()), SPACE, dtype=np.int8)
    try:
        for label, first, last in _spans(source):
            labels_N[_offset(lines, starts, first) : _offset(lines, starts, last)] = label
    except (tokenize.TokenError, SyntaxError):
        return None
    return labels_N


def _offset(lines: list[str], starts: NDArray[np.int64], place: tuple[int, int]) -> int:
    row, column = place
    line = lines[row - 1]
    return int(starts[row - 1]) + (column if line.isascii() else len(line[:column].encode()))


def _spans(source: str) -> Iterator[tuple[int, tuple[int, int], tuple[int, int]]]:
    """Yield (class, start, end), rows from 1, columns in characters; pieces of an f-string are strings."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            yield (KEYWORD if keyword.iskeyword(token.string) else NAME), token.start, token.end
        elif token.type in OF_TYPE:
            yield OF_TYPE[token.type], token.start, token.end
        elif tokenize.tok_name[token.type].startswith("FSTRING"):
            yield STRING, token.start, token.end
