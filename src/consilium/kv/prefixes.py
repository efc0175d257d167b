"""Parts of prompts whose rows are still in the pool, for other prompts that begin with the same tokens.

A part is found by a digest of its tokens and of all before them: what is computed for a token depends on
nothing else.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import final

from consilium.kv.pages import Pages


def digests(tokens: Sequence[int], size: int, salt: bytes = b"") -> tuple[bytes, ...]:
    """SHA-256 of each whole part of ``size`` tokens, chained to the part before, the first to ``salt``."""
    found: list[bytes] = []
    for first in range(0, len(tokens) - size + 1, size):
        before = found[-1] if found else hashlib.sha256(salt).digest()
        found.append(hashlib.sha256(before + array("q", tokens[first : first + size]).tobytes()).digest())
    return tuple(found)


@final
class Prefixes:
    """Owns the pages of each part that it keeps; forgets first what was used longest ago."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._kept: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()

    @property
    def pages(self) -> int:
        """How many are kept."""
        return sum(map(len, self._kept.values()))

    def find(self, parts: Sequence[bytes]) -> list[int]:
        """The pages of as many parts from the first on as are kept, with the caller as one more owner."""
        known = 0
        while known < len(parts) and parts[known] in self._kept:
            known += 1
        # A part is of no use without those before it, so these are forgotten later.
        for part in reversed(parts[:known]):
            self._kept.move_to_end(part)
        found = [page for part in parts[:known] for page in self._kept[part]]
        self._pages.share(found)
        return found

    def keep(self, part: bytes, pages: Sequence[int]) -> None:
        """Own the pages of a part, unless another sequence computed the same one meanwhile."""
        if part not in self._kept:
            self._pages.share(pages)
            self._kept[part] = tuple(pages)

    def forget(self) -> bool:
        """Release the part that was used longest ago and no sequence reads; False where there is none."""
        for part, pages in self._kept.items():
            if self._pages.owned_once(pages):
                self._pages.release(self._kept.pop(part))
                return True
        return False
