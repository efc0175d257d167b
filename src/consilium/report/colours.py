"""One diverging scale for every ratio to a fair share: blue below, orange above, colour-blind safe.

Ratios are coloured by their logarithm, so that half and twice the fair share are equally far from the middle.
On dark pages the same image is shown inverted with its hues turned back, which keeps blue blue.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from consilium.report.png import Colour

OCTAVES = 2.0
"""The scale ends at 2 ** -OCTAVES and 2 ** OCTAVES times the fair share."""
LEVELS = 65
NEVER = LEVELS
"""Index of what is exactly zero."""
MISSING = LEVELS + 1
"""Index of what was not measured: transparent."""

_STOPS: tuple[Colour, ...] = ((8, 48, 107), (66, 146, 198), (243, 243, 241), (241, 138, 50), (140, 45, 4))


def _between(position: float) -> Colour:
    """Colour at ``position`` in [0, 1] along the stops."""
    place = position * (len(_STOPS) - 1)
    low = min(int(place), len(_STOPS) - 2)
    part = place - low
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(_STOPS[low], _STOPS[low + 1], strict=True))
    return red, green, blue


PALETTE: tuple[Colour, ...] = (
    *(_between(level / (LEVELS - 1)) for level in range(LEVELS)),
    (0, 0, 0),
    (255, 255, 255),
)


def indices(ratio: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Palette index of each ratio to a fair share of 1.0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        position = (np.log2(ratio) + OCTAVES) / (2 * OCTAVES)
    level = np.rint(np.clip(np.nan_to_num(position, nan=0.0), 0.0, 1.0) * (LEVELS - 1))
    level = np.where(ratio <= 0, NEVER, level)
    return np.where(np.isnan(ratio), MISSING, level).astype(np.uint8)
