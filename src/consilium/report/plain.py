"""Plain text: aligned columns for the terminal, tables in Markdown, numbers with units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from consilium.words.width import padded, width

_THOUSANDS = ("", " k", " M", " B", " T")
_FLOPS = (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP", " ZFLOP", " YFLOP")
_BYTES = (" B", " KiB", " MiB", " GiB", " TiB", " PiB")


def counted(value: int) -> str:
    """``37.55 B`` for 37,552,282,624."""
    return _scaled(value, 1000, _THOUSANDS)


def operations(value: int) -> str:
    """``83.49 GFLOP``."""
    return _scaled(value, 1000, _FLOPS)


def sized(value: int) -> str:
    """``1.221 TiB``: bytes in powers of 1024."""
    return _scaled(value, 1024, _BYTES)


def _scaled(value: int, base: int, units: Sequence[str]) -> str:
    """Four digits and the largest unit that keeps the number at or above one."""
    unit = 0
    scaled = float(value)
    while scaled >= base and unit + 1 < len(units):
        scaled /= base
        unit += 1
    decimals = max(0, 4 - len(str(int(scaled)))) if unit else 0
    return f"{scaled:,.{decimals}f}{units[unit]}"


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = (), indent: str = "") -> str:
    """Align ``rows`` in columns two spaces apart; those numbered in ``right`` are aligned to the right."""
    widths = [max(map(width, column)) for column in zip_longest(*rows, fillvalue="")]
    lines: list[str] = []
    for row in rows:
        cells = (
            padded(cell, wide, right=i in right)
            for i, (cell, wide) in enumerate(zip(row, widths, strict=False))
        )
        lines.append(f"{indent}{'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
