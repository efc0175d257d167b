"""Text in columns of a terminal, where a Chinese character is as wide as two letters."""

from __future__ import annotations

import re
import unicodedata

_CLOSING = "，。、；：！？）》”"
_PIECE = re.compile(
    rf"\s+|[（《“]*(?:[\u2e80-\u9fff\uff00-\uffef]|[^\s\u2e80-\u9fff\uff00-\uffef]+)[{_CLOSING}]*"
)
"""What a line is not broken in: a word, or a Chinese character with the punctuation that belongs to it."""


def width(text: str) -> int:
    """Columns that ``text`` takes."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def padded(text: str, columns: int, *, right: bool = False) -> str:
    """``text`` filled with blanks up to ``columns``."""
    blanks = " " * (columns - width(text))
    return blanks + text if right else text + blanks


def wrapped(text: str, columns: int) -> list[str]:
    """Lines of at most ``columns``; a piece that is wider stands alone."""
    lines = [""]
    for piece in _PIECE.findall(" ".join(text.split())):
        if width(lines[-1]) + width(piece) > columns and lines[-1]:
            lines.append("")
        lines[-1] += piece if lines[-1] or not piece.isspace() else ""
    return [line.rstrip() for line in lines]
