"""Which pages of a pool are free, and how many owners each of the others has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final


@final
class Pages:
    """Numbers of pages. Invariant: a page is free, or has at least one owner, never both."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._owners: list[int] = []

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def total(self) -> int:
        return len(self._owners)

    def add(self, count: int) -> None:
        """Number ``count`` more pages, which are free; the lowest is taken first."""
        self._free = [*reversed(range(self.total, self.total + count)), *self._free]
        self._owners += [0] * count

    def take(self, count: int) -> list[int]:
        """Pages that the caller now owns alone."""
        assert count <= self.free, "who takes has made room"
        taken = [self._free.pop() for _ in range(count)]
        self.share(taken)
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more owner for each of ``pages``."""
        for page in pages:
            self._owners[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One owner less; who has none is free."""
        for page in pages:
            assert self._owners[page] > 0, "only owners release"
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free.append(page)

    def owned_once(self, pages: Sequence[int]) -> bool:
        """Whether each of ``pages`` has one owner."""
        return all(self._owners[page] == 1 for page in pages)
